"""Name maps: every parameter is filled once, heads land where the attention reads them."""

import flax.linen as nn
import jax
import numpy as np
import pytest

from batchjax import models

TINY = [name for name in models.SHAPES if name.startswith("tiny")]


def find(tree, path):
  for key in path:
    tree = tree[key]
  return tree


def zeros(config):
  shapes = nn.unbox(jax.eval_shape(lambda: models.init_params(config, jax.random.key(0))))
  return jax.tree.map(lambda x: np.zeros(x.shape), shapes)


@pytest.mark.parametrize("shape", TINY)
def test_every_element_is_filled_once(shape):
  config = models.SHAPES[shape]
  counts = zeros(config)
  for target in models.name_map(config).values():
    part = target.part_of(find(counts, target.path))
    part += target.arrange(np.ones(target.shape))
  for path, count in jax.tree_util.tree_leaves_with_path(counts):
    assert (count == 1).all(), path


@pytest.mark.parametrize("shape", TINY)
def test_arranged_tensors_have_the_shape_of_their_slot(shape):
  config = models.SHAPES[shape]
  params = zeros(config)
  for name, target in models.name_map(config).items():
    slot = target.part_of(find(params, target.path))
    assert target.arrange(np.zeros(target.shape)).shape == slot.shape, name


def test_qkv_head_order():
  config = models.SHAPES["tiny_qwen2"]  # Q 4, K 2, so G 2; H 8, D 32
  names = models.name_map(config)
  rng = np.random.default_rng(0)
  tensors = {part: rng.normal(size=(heads * 8, 32)) for part, heads in
             (("q", 4), ("k", 2), ("v", 2))}
  qkv, bias = np.zeros((32, 2 * 4 * 8)), np.zeros((2, 4, 8))
  for part, tensor in tensors.items():
    target = names[f"model.layers.1.self_attn.{part}_proj.weight"]
    assert target.path == ("layers_1", "attn", "qkv")
    target.part_of(qkv)[...] = target.arrange(tensor)
    target = names[f"model.layers.1.self_attn.{part}_proj.bias"]
    assert target.path == ("layers_1", "attn", "qkv_bias")
    target.part_of(bias)[...] = target.arrange(tensor[:, 0])
  qkv = qkv.reshape(32, 2, 4, 8)
  x = rng.normal(size=32)
  for k in range(2):
    for g in range(2):
      expected = (tensors["q"] @ x).reshape(4, 8)[k * 2 + g]
      np.testing.assert_allclose(np.einsum("d,dh->h", x, qkv[:, k, g]), expected)
      np.testing.assert_array_equal(bias[k, g], tensors["q"][:, 0].reshape(4, 8)[k * 2 + g])
    for slot, part in ((2, "k"), (3, "v")):
      expected = (tensors[part] @ x).reshape(2, 8)[k]
      np.testing.assert_allclose(np.einsum("d,dh->h", x, qkv[:, k, slot]), expected)


def test_out_gate_up_and_down():
  config = models.SHAPES["tiny_llama"]
  names = models.name_map(config)
  rng = np.random.default_rng(0)

  o_proj, heads = rng.normal(size=(32, 32)), rng.normal(size=32)
  out = names["model.layers.0.self_attn.o_proj.weight"].arrange(o_proj)
  np.testing.assert_allclose(np.einsum("kgh,kghd->d", heads.reshape(2, 2, 8), out), o_proj @ heads)

  gate, up = (names[f"model.layers.0.mlp.{name}_proj.weight"] for name in ("gate", "up"))
  assert gate.path == up.path == ("layers_0", "ffn", "gate_up")
  fused = np.zeros((32, 2 * 64))
  for target, value in ((gate, 1), (up, 2)):
    target.part_of(fused)[...] = target.arrange(np.full((64, 32), value))
  assert (fused[:, :64] == 1).all() and (fused[:, 64:] == 2).all()

  down = rng.normal(size=(32, 64))
  np.testing.assert_array_equal(names["model.layers.0.mlp.down_proj.weight"].arrange(down), down.T)


def test_gemma_norm_names():
  names = models.name_map(models.SHAPES["tiny_gemma2"])
  prefix = "model.layers.0."
  assert {name.removeprefix(prefix): target.path[1] for name, target in names.items()
          if name.startswith(prefix) and name.endswith("layernorm.weight")} == {
              "input_layernorm.weight": "attn_norm",
              "post_attention_layernorm.weight": "post_attn_norm",
              "pre_feedforward_layernorm.weight": "ffn_norm",
              "post_feedforward_layernorm.weight": "post_ffn_norm"}
