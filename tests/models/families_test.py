"""Hugging Face configs, as model repositories hold them, become the right `ModelConfig`."""

import dataclasses
import re

import pytest

from batchjax import models
from batchjax.config import ConfigError, RopeScaling

SMOLLM2 = dict(
    model_type="llama", vocab_size=49152, hidden_size=576, intermediate_size=1536,
    num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3, hidden_act="silu",
    max_position_embeddings=8192, rms_norm_eps=1e-5, rope_theta=100000, rope_scaling=None,
    tie_word_embeddings=True, bos_token_id=1, eos_token_id=2, attention_bias=False)

LLAMA3_2_1B = dict(
    model_type="llama", vocab_size=128256, hidden_size=2048, intermediate_size=8192, head_dim=64,
    num_hidden_layers=16, num_attention_heads=32, num_key_value_heads=8, hidden_act="silu",
    max_position_embeddings=131072, rms_norm_eps=1e-5, rope_theta=500000.0,
    rope_scaling=dict(factor=32.0, high_freq_factor=4.0, low_freq_factor=1.0,
                      original_max_position_embeddings=8192, rope_type="llama3"),
    tie_word_embeddings=True, bos_token_id=128000, eos_token_id=[128001, 128008, 128009])

QWEN3_0_6B = dict(
    model_type="qwen3", vocab_size=151936, hidden_size=1024, intermediate_size=3072, head_dim=128,
    num_hidden_layers=28, num_attention_heads=16, num_key_value_heads=8, hidden_act="silu",
    max_position_embeddings=40960, rms_norm_eps=1e-6, rope_theta=1000000, rope_scaling=None,
    tie_word_embeddings=True, bos_token_id=151643, eos_token_id=[151645, 151643],
    max_window_layers=28, sliding_window=None, use_sliding_window=False, attention_bias=False)

SMALL = dict(vocab_size=128, hidden_size=32, intermediate_size=48, num_hidden_layers=12,
             num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256)


@pytest.mark.parametrize("hf_config, shape", [
    (SMOLLM2, "smollm2_135m"), (LLAMA3_2_1B, "llama3_2_1b"), (QWEN3_0_6B, "qwen3_0_6b")])
def test_known_shapes(hf_config, shape):
  assert models.config_from_hf(hf_config) == models.SHAPES[shape]


@pytest.mark.parametrize("shape, num_params", [
    ("smollm2_135m", 134.5e6), ("llama3_2_1b", 1.236e9), ("llama3_8b", 8.03e9),
    ("qwen3_0_6b", 0.596e9)])
def test_known_shapes_have_the_published_size(shape, num_params):
  assert models.SHAPES[shape].num_params == pytest.approx(num_params, rel=2e-3)


def test_newer_files_keep_rope_in_one_place():
  newer = {k: v for k, v in LLAMA3_2_1B.items() if k not in ("rope_scaling", "rope_theta")}
  newer["rope_parameters"] = {**LLAMA3_2_1B["rope_scaling"], "rope_theta": 500000.0}
  assert models.config_from_hf(newer) == models.SHAPES["llama3_2_1b"]


def test_absent_settings_take_the_defaults_of_the_family():
  absent = models.config_from_hf(dict(SMALL, model_type="llama"))
  assert (absent.bos_token_id, absent.eos_token_ids, absent.norm_eps) == (1, (2,), 1e-6)
  assert absent.head_dim == 8 and not absent.tie_embeddings and absent.rope_theta == 10_000.0
  null = models.config_from_hf(dict(SMALL, model_type="llama", eos_token_id=None, head_dim=None,
                                    num_key_value_heads=None))
  assert null.eos_token_ids == () and null.head_dim == 8 and null.num_kv_heads == 4


@pytest.mark.parametrize("window, kinds", [(None, {"global"}), (7, {"local"})])
def test_mistral_window(window, kinds):
  config = models.config_from_hf(dict(SMALL, model_type="mistral", sliding_window=window))
  assert config.sliding_window == window and set(config.layer_kinds) == kinds


def test_qwen2_window_starts_behind_the_first_layers():
  hf_config = dict(SMALL, model_type="qwen2", sliding_window=7, max_window_layers=10)
  off = models.config_from_hf(hf_config | dict(use_sliding_window=False))
  assert off.qkv_bias and off.sliding_window is None and set(off.layer_kinds) == {"global"}
  on = models.config_from_hf(hf_config | dict(use_sliding_window=True))
  assert on.sliding_window == 7 and on.layer_kinds == ("global",) * 10 + ("local",) * 2


def test_gemma2():
  config = models.config_from_hf(dict(
      SMALL, model_type="gemma2", hidden_act="gelu_pytorch_tanh", head_dim=16, sliding_window=9,
      query_pre_attn_scalar=144, attn_logit_softcapping=50.0, final_logit_softcapping=30.0))
  assert config.layer_kinds == ("local", "global") * 6 and config.sliding_window == 9
  assert config.embed_scale == 32 ** 0.5 and config.query_scale == 1 / 12
  assert config.attn_soft_cap == 50.0 and config.final_soft_cap == 30.0
  assert config.norm_plus_one and config.post_norms and config.tie_embeddings
  assert config.activation == "gelu_tanh" and not config.qk_norm


def test_gemma3_older_file():
  config = models.config_from_hf(dict(
      SMALL, model_type="gemma3_text", head_dim=16, sliding_window=9, sliding_window_pattern=6,
      rope_theta=1e6, rope_local_base_freq=1e4, query_pre_attn_scalar=256,
      rope_scaling=dict(factor=8.0, rope_type="linear"), eos_token_id=[1, 106]))
  assert config.layer_kinds == (("local",) * 5 + ("global",)) * 2
  assert config.rope_theta == 1e6 and config.rope_local_theta == 1e4
  assert config.rope_scaling == RopeScaling("linear", 8.0)
  assert config.qk_norm and config.final_soft_cap is None and config.eos_token_ids == (1, 106)


def test_families_name_themselves():
  for model_type in models.FAMILIES:
    config = models.config_from_hf(dict(SMALL, model_type=model_type))
    assert config.family == model_type
    assert len(models.name_map(config)) > 12 * 9


@pytest.mark.parametrize("changes, message", [
    (dict(model_type="bert"), "'bert' is unknown; known: .*'gemma2', .*'llama'"),
    (dict(model_type=None), "None is unknown"),
    (dict(vocab_size=None), "lacks .*vocab_size"),
    (dict(attention_bias=True), "attention_bias"),
    (dict(mlp_bias=True), "mlp_bias"),
    (dict(hidden_act="relu"), "'relu' is unknown"),
    (dict(rope_scaling=dict(type="yarn", factor=4.0)), "'yarn' is unknown"),
    (dict(rope_parameters=dict(rope_theta=1e4, partial_rotary_factor=0.5)), "part of the head"),
    (dict(model_type="qwen3", attention_bias=True), "attention_bias"),
    (dict(model_type="gemma2", layer_types=["chunked_attention"] * 12), "chunked_attention"),
    (dict(model_type="gemma3_text", use_bidirectional_attention=True), "bidirectional"),
])
def test_what_cannot_be_computed_is_named(changes, message):
  with pytest.raises(ConfigError, match=message):
    models.config_from_hf(dict(SMALL, model_type="llama") | changes)


@pytest.mark.parametrize("model_type", models.FAMILIES)
@pytest.mark.parametrize("name, value", [
    ("mlp_bias", True), ("lm_head_bias", True), ("partial_rotary_factor", 0.5), ("rotary_pct", 0.25),
    ("no_rope_layers", [1, 0]), ("alibi", True), ("use_mrope", True), ("is_causal", False),
    ("add_cross_attention", True), ("use_bidirectional_attention", True),
    ("attention_chunk_size", 8192), ("attn_output_gate", True), ("logit_scale", 0.0625),
    ("logits_scaling", 8.0), ("embedding_multiplier", 12), ("residual_multiplier", 0.22),
    ("attention_multiplier", 0.5), ("scale_emb", 12), ("num_experts", 8), ("num_local_experts", 8),
    ("q_lora_rank", 512), ("quantization_config", {"quant_method": "awq", "bits": 4}),
    ("quantization", {"group_size": 64, "bits": 4}), ("pruned_heads", {"0": [1]})])
def test_settings_that_no_family_computes_are_refused(model_type, name, value):
  hf_config = dict(SMALL, model_type=model_type)
  models.config_from_hf(hf_config | {name: None})
  with pytest.raises(ConfigError, match=rf"config\.json: {name}=.* is not supported for model_type "
                     rf"'{model_type}': (take another model|load the model's own)"):
    models.config_from_hf(hf_config | {name: value})


@pytest.mark.parametrize("name, families", [
    ("attention_bias", {"qwen2"}), ("sliding_window", set(models.FAMILIES) - {"llama"}),
    ("use_sliding_window", {"qwen2", "qwen3"}), ("attn_logit_softcapping", {"gemma2", "gemma3_text"}),
    ("final_logit_softcapping", {"gemma2", "gemma3_text"}),
    ("query_pre_attn_scalar", {"gemma2", "gemma3_text"}), ("rope_local_base_freq", {"gemma3_text"}),
    ("sliding_window_pattern", {"gemma3_text"}), ("use_qk_norm", {"qwen3", "gemma3_text"})])
def test_settings_that_some_families_compute(name, families):
  value = True if name in ("attention_bias", "use_sliding_window", "use_qk_norm") else 4
  for model_type in models.FAMILIES:
    hf_config = dict(SMALL, model_type=model_type) | {name: value}
    if model_type in families:
      models.config_from_hf(hf_config)
    else:
      with pytest.raises(ConfigError, match=f"{name}={value} is not supported for .*'{model_type}'"):
        models.config_from_hf(hf_config)


def test_settings_that_change_nothing_are_taken():
  plain = models.config_from_hf(SMOLLM2)
  assert plain == models.config_from_hf(SMOLLM2 | dict(
      attention_bias=False, mlp_bias=False, num_experts=0, partial_rotary_factor=1.0, pruned_heads={},
      layer_types=["full_attention"] * 30, use_sliding_window=False, quantization_config=None,
      rope_interleaved=False, pretraining_tp=2, unsloth_fixed=True, transformers_version="4.40"))


@pytest.mark.parametrize("model_type", models.FAMILIES)
@pytest.mark.parametrize("name, value", [
    *((name, value) for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads",
                                 "num_key_value_heads", "max_position_embeddings", "head_dim")
      for value in (0, -1, 1.5, "8", True, [8], {}, 2**31, 10**400)),
    *((name, value) for name in ("rms_norm_eps", "rope_theta")
      for value in (0, -1.0, "1", True, [], float("nan"), float("inf"), 10**400)),
    ("tie_word_embeddings", "true"), ("tie_word_embeddings", 1), ("hidden_act", 3), ("rope_scaling", []),
    ("rope_parameters", "x"), ("eos_token_id", "2"), ("eos_token_id", [[1]]), ("bos_token_id", -1),
    ("layer_types", "full_attention"), ("layer_types", [1] * 12), ("head_dim", 7),
    ("num_hidden_layers", 10_001)])
def test_wrong_values_are_one_line(model_type, name, value):
  with pytest.raises(ConfigError, match=f"config.json: .*{name}=") as error:
    models.config_from_hf(dict(SMALL, model_type=model_type) | {name: value})
  assert "\n" not in str(error.value) and len(str(error.value)) < 300


LINEAR = dict(rope_type="linear", factor=2.0)
LLAMA3 = LLAMA3_2_1B["rope_scaling"]


@pytest.mark.parametrize("rope, message", [
    (dict(rope_type="linear"), "of type 'linear' lacks factor"),
    (dict(factor=2.0), r"\.factor=2.0 is not supported for the rope type 'default': name the rope_type"),
    (LINEAR | dict(attention_factor=0.5), "attention_factor=0.5 is not supported"),
    (LINEAR | dict(type="llama3"), r"type='llama3' contradicts rope_type='linear'"),
    (LINEAR | dict(factor=0), r"factor=0 must be a number above 0"),
    (LINEAR | dict(factor="2"), r"factor='2' must be a number above 0"),
    (LINEAR | dict(rope_theta=-1), r"rope_theta=-1 must be a number above 0"),
    (LINEAR | dict(partial_rotary_factor=0.5), "part of the head"),
    (LLAMA3 | dict(low_freq_factor=4.0), "low_freq_factor=4.0 must be below high_freq_factor=4.0"),
    *((LLAMA3 | {name: None}, f"of type 'llama3' lacks {name}") for name in (
        "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")),
    *((dict(rope_type=kind, factor=2.0), f"rope type {re.escape(repr(kind))} is unknown; known: .*llama3") for kind in (
        "yarn", "dynamic", "longrope", "proportional", 3, ["linear"])),
])
@pytest.mark.parametrize("name", ["rope_scaling", "rope_parameters"])
def test_rope_settings_that_are_not_understood_are_refused(rope, message, name):
  with pytest.raises(ConfigError, match=re.compile(f"config.json: {name}.*{message}")):
    models.config_from_hf(LLAMA3_2_1B | dict(rope_scaling=None) | {name: rope})


def test_rope_settings_that_contradict_each_other_are_refused():
  both = LLAMA3_2_1B | dict(rope_parameters=LLAMA3_2_1B["rope_scaling"])
  assert models.config_from_hf(both) == models.config_from_hf(LLAMA3_2_1B)
  with pytest.raises(ConfigError, match="contradict each other: remove the wrong one"):
    models.config_from_hf(both | dict(rope_parameters=dict(rope_type="default")))


@pytest.mark.parametrize("rope, message", [
    (dict(LINEAR), "lacks full_attention, an object"),
    (dict(full_attention=LINEAR), "lacks sliding_attention"),
    (dict(full_attention=LINEAR, sliding_attention=LINEAR), "sliding_attention: scaling is not supported"),
    (dict(full_attention=dict(rope_type="linear"), sliding_attention={}),
     r"rope_parameters\.full_attention of type 'linear' lacks factor")])
def test_rope_settings_of_gemma3(rope, message):
  with pytest.raises(ConfigError, match=message):
    models.config_from_hf(dict(SMALL, model_type="gemma3_text", rope_parameters=rope))


def test_key_value_heads_may_only_be_left_out_where_all_families_agree():
  without = {name: value for name, value in SMALL.items() if name != "num_key_value_heads"}
  for model_type in models.FAMILIES:
    if model_type == "llama":
      assert models.config_from_hf(dict(without, model_type=model_type)).num_kv_heads == 4
    else:
      with pytest.raises(ConfigError, match=r"lacks \['num_key_value_heads'\]"):
        models.config_from_hf(dict(without, model_type=model_type))


def test_configs_are_hashable():
  for config in models.SHAPES.values():
    assert hash(config) == hash(dataclasses.replace(config))
