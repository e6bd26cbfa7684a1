"""Random parameters: reproducible, different from each other, and of a sensible scale."""

import dataclasses

import numpy as np
import pytest

from batchjax import models, weights
from batchjax.config import ConfigError, ModelSource
from batchjax.weights.random import random_params
from batchjax.weights.tree import flatten, nest


def draw(shape="tiny_llama", seed=0, dtype="float32"):
  source = ModelSource(format="random", shape=shape, seed=seed, dtype=dtype)
  model = weights.load_model(source)
  assert model.config == weights.load_config(source)
  return {path: np.asarray(leaf) for path, leaf in flatten(model.params).items()}


def test_a_seed_fixes_every_parameter():
  first, again, other = draw(seed=3), draw(seed=3), draw(seed=4)
  for path, leaf in first.items():
    np.testing.assert_array_equal(leaf, again[path])
    assert path.endswith("scale") or not np.array_equal(leaf, other[path]), path


def test_the_figures_themselves_do_not_drift():
  np.testing.assert_allclose(draw(seed=0)["layers_1/ffn/down"][0, :3],
                             [0.08591252, -0.02704123, 0.02944953], rtol=1e-5)


def test_parameters_of_one_shape_differ():
  params = draw()
  assert not np.array_equal(params["layers_0/attn/qkv"], params["layers_1/attn/qkv"])
  assert not np.array_equal(params["embed/embedding"], params["lm_head/kernel"])


def test_a_parameter_depends_on_its_path_alone():
  config = models.SHAPES["tiny_llama"]
  shallow = flatten(random_params(dataclasses.replace(config, ffn_size=128), 0))
  np.testing.assert_array_equal(shallow["layers_1/attn/qkv"], draw()["layers_1/attn/qkv"])


@pytest.mark.parametrize("shape", [name for name in models.SHAPES if name.startswith("tiny")])
def test_scales_keep_activations_in_range(shape):
  """Each part of a forward pass, on unit input: the spread that comes out stays near 1."""
  config, params = models.SHAPES[shape], draw(shape)
  rng = np.random.default_rng(0)
  x = rng.standard_normal((512, config.hidden_size))
  width = rng.standard_normal((512, config.ffn_size))
  residual = (2 * config.num_layers) ** -0.5
  for i in range(config.num_layers):
    layer = f"layers_{i}/"
    assert 0.8 < (x @ params[layer + "attn/qkv"]).std() < 1.25
    assert 0.8 < (x @ params[layer + "ffn/gate_up"]).std() < 1.25
    assert 0.8 < (width @ params[layer + "ffn/down"]).std() / residual < 1.25
    out = params[layer + "attn/out"]
    heads = rng.standard_normal((512, *out.shape[:3]))
    assert 0.8 < np.einsum("tkgh,kghd->td", heads, out).std() / residual < 1.25
    assert (params[layer + "attn_norm/scale"] == float(not config.norm_plus_one)).all()
  head = params["embed/embedding" if config.tie_embeddings else "lm_head/kernel"]
  assert 0.8 < (x @ head.T).std() < 1.25


def test_dtypes_round_the_same_figures():
  full, half = draw(), draw(dtype="bfloat16")
  for path, leaf in full.items():
    assert half[path].dtype == "bfloat16"
    np.testing.assert_allclose(half[path].astype(np.float32), leaf, rtol=2 ** -7, atol=1e-6)


def test_an_unknown_shape_is_named():
  with pytest.raises(ConfigError, match="'llama9' is unknown; known: .*'tiny_llama'"):
    weights.load_config(ModelSource(format="random", shape="llama9"))


def test_flatten_undoes_nest():
  by_path = {"a/b/c": 1, "a/b/d": 2, "e/f": 3}
  assert nest(by_path) == {"params": {"a": {"b": {"c": 1, "d": 2}}, "e": {"f": 3}}}
  assert flatten(nest(by_path)) == by_path
