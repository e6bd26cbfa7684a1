"""Settings of a Hugging Face `config.json`: of the right type, and none passed over that counts."""

from collections.abc import Collection, Mapping
import math
from typing import Any

from batchjax.config import ConfigError, RopeScaling

# Integers, with their least value.
_INTEGERS = {
    "vocab_size": 1, "hidden_size": 1, "intermediate_size": 1, "num_hidden_layers": 1,
    "num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 1, "max_position_embeddings": 1,
    "sliding_window": 1, "max_window_layers": 0, "sliding_window_pattern": 1,
    "_sliding_window_pattern": 1, "bos_token_id": 0}
_POSITIVE = ("rms_norm_eps", "rope_theta", "rope_local_base_freq", "query_pre_attn_scalar",
             "attn_logit_softcapping", "final_logit_softcapping")
_FLAGS = ("tie_word_embeddings", "use_sliding_window")
_TEXTS = ("model_type", "hidden_act", "hidden_activation")
_OBJECTS = ("rope_scaling", "rope_parameters")
MAX_LAYERS = 10_000

# Settings that change what a model computes, with the values at which they change nothing; null
# and absent are such values for all. A family that computes one takes it out of its own check.
_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    # Biases.
    "attention_bias": (False,), "mlp_bias": (False,), "qkv_bias": (False,), "use_bias": (False,),
    "bias": (False,), "attention_out_bias": (False,), "attention_qkv_bias": (False,),
    "lm_head_bias": (False,), "use_qkv_bias": (False,),
    # Which tokens are seen.
    "sliding_window": (), "use_sliding_window": (False,), "layer_types": (), "attention_window": (),
    "sliding_window_pattern": (), "_sliding_window_pattern": (), "attention_chunk_size": (),
    "use_bidirectional_attention": (False,), "is_causal": (True,), "causal": (True,),
    "is_encoder_decoder": (False,), "add_cross_attention": (False,), "attention_sinks": (False,),
    # Positions.
    "partial_rotary_factor": (1, 1.0), "rotary_pct": (1, 1.0), "rope_pct": (1, 1.0),
    "rotary_emb_base": (), "rope_local_base_freq": (), "alibi": (False,),
    "use_alibi": (False,), "no_rope_layers": ([],), "no_rope_layer_interval": (0,),
    "use_rope": (True,), "rope_interleaved": (False,), "rope_interleave": (False,),
    "use_mrope": (False,), "use_dynamic_ntk": (False,), "use_logn_attn": (False,),
    "attn_temperature_tuning": (False,), "position_embedding_type": ("rope",),
    # Norms.
    "qk_norm": (False,), "use_qk_norm": (False,), "qk_layernorm": (False,),
    "norm_type": ("rmsnorm", "rms_norm"),
    # Scales and caps.
    "attn_logit_softcapping": (), "final_logit_softcapping": (), "query_pre_attn_scalar": (),
    "attn_output_gate": (False,), "logit_scale": (1, 1.0), "logits_scaling": (1, 1.0),
    "attention_multiplier": (), "embedding_multiplier": (1, 1.0), "residual_multiplier": (1, 1.0),
    "scale_emb": (1, 1.0), "scale_depth": (), "dim_model_base": (), "attention_scale": (),
    "output_multiplier_scale": (1, 1.0), "embedding_multiplier_scale": (1, 1.0),
    # Experts, and other shapes.
    "num_experts": (0, 1), "num_local_experts": (0, 1), "n_routed_experts": (0, 1),
    "moe_intermediate_size": (), "q_lora_rank": (), "kv_lora_rank": (), "num_kv_shared_layers": (0,),
    "pruned_heads": ({},), "v_head_dim": (),
    # Weights in other formats.
    "quantization_config": (), "quantization": (), "compression_config": (),
}
_REMEDIES = {
    "quantization_config": "load the model's own weights in bfloat16 or float32",
    "quantization": "load the model's own weights in bfloat16 or float32",
    "compression_config": "load the model's own weights in bfloat16 or float32",
}
_ROPE_KEYS = {
    "default": (), "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")}


def check(hf_config: Mapping[str, Any], computes: Collection[str]) -> None:
  """Looks at every setting before a family reads its own.

  Args:
    hf_config: contents of `config.json`.
    computes: settings that change the numbers and that the family reads.

  Raises:
    ConfigError: a setting is of the wrong type or out of range, or has a value that
      the family does not compute; the message names it.
  """
  for name, value in hf_config.items():
    if value is None:
      continue
    if name in _INTEGERS:
      limit = MAX_LAYERS if name == "num_hidden_layers" else 2**31 - 1
      _require(_is_int(value) and _INTEGERS[name] <= value <= limit, name, value,
               f"must be an integer from {_INTEGERS[name]} to {limit}")
    elif name in _POSITIVE:
      _require(_is_number(value) and value > 0, name, value, "must be a number above 0")
    elif name in _FLAGS:
      _require(isinstance(value, bool), name, value, "must be true or false")
    elif name in _TEXTS:
      _require(isinstance(value, str), name, value, "must be a string")
    elif name in _OBJECTS:
      _require(isinstance(value, dict), name, value, "must be an object")
  eos = hf_config.get("eos_token_id")
  _require(all(_is_int(i) and i >= 0 for i in (eos if isinstance(eos, list) else [eos or 0])),
           "eos_token_id", eos, "must be a token id or a list of them")
  kinds = hf_config.get("layer_types")
  _require(kinds is None or isinstance(kinds, list) and all(isinstance(k, str) for k in kinds),
           "layer_types", kinds, "must be a list of strings")
  for name, neutral in _NEUTRAL.items():
    value = hf_config.get(name)
    if value is None or name in computes or any(
        value == other and type(value) is type(other) for other in neutral):
      continue
    if name == "layer_types" and set(value) == {"full_attention"}:
      continue
    remedy = _REMEDIES.get(name, "take another model, or remove the setting if it has no effect")
    raise ConfigError(f"config.json: {name}={short(value)} is not supported for model_type "
                      f"{hf_config.get('model_type')!r}: {remedy}")


def rope(settings: Mapping[str, Any], theta: float, where: str = "rope_parameters"
         ) -> tuple[float, RopeScaling | None]:
  """Rope base and scaling of `rope_parameters` or of the older `rope_scaling`.

  Args:
    settings: the object; empty is plain rope.
    theta: the base where it does not name it.
    where: the setting's name, for messages.

  Raises:
    ConfigError: the scaling is of an unknown type, or lacks a key, or has one that its type
      does not have.
  """
  settings = {name: value for name, value in settings.items() if value is not None}
  kind = settings.get("rope_type", settings.get("type", "default"))
  _require(settings.get("type", kind) == kind, f"{where}.type", settings.get("type"),
           f"contradicts rope_type={kind!r}")
  if not isinstance(kind, str) or kind not in _ROPE_KEYS:
    raise ConfigError(f"config.json: {where}: rope type {kind!r} is unknown; "
                      f"known: {sorted(_ROPE_KEYS)}")
  if settings.get("partial_rotary_factor", 1) != 1:
    raise ConfigError(f"config.json: {where}.partial_rotary_factor="
                      f"{short(settings['partial_rotary_factor'])}: rope over a part of the head "
                      "is not supported")
  needed = _ROPE_KEYS[kind]
  known = {*needed, "rope_theta", "rope_type", "type", "partial_rotary_factor",
           "original_max_position_embeddings"}  # the last one has a use in llama3 alone
  for name in sorted(set(settings) - known):
    raise ConfigError(f"config.json: {where}.{name}={short(settings[name])} is not supported for "
                      f"the rope type {kind!r}: name the rope_type it belongs to; "
                      f"known: {sorted(_ROPE_KEYS)}")
  for name in needed:
    if name not in settings:
      raise ConfigError(f"config.json: {where} of type {kind!r} lacks {name}: fetch the file again")
  for name in {*needed, "rope_theta"} & set(settings):
    _require(_is_number(settings[name]) and settings[name] > 0, f"{where}.{name}", settings[name],
             "must be a number above 0")
  theta = float(settings.get("rope_theta", theta))
  if kind == "default":
    return theta, None
  if kind == "linear":
    return theta, RopeScaling("linear", float(settings["factor"]))
  low, high = (float(settings[f"{end}_freq_factor"]) for end in ("low", "high"))
  _require(low < high, f"{where}.low_freq_factor", low, f"must be below high_freq_factor={high}")
  return theta, RopeScaling("llama3", float(settings["factor"]), low, high,
                            int(settings["original_max_position_embeddings"]))


def _is_int(value: Any) -> bool:
  return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
  """A finite number that a float can hold."""
  try:
    return not isinstance(value, bool) and isinstance(value, (int, float)) and math.isfinite(value)
  except OverflowError:
    return False


def _require(holds: bool, name: str, value: Any, message: str) -> None:
  if not holds:
    raise ConfigError(f"config.json: {name}={short(value)} {message}: fetch the file again")


def short(value: Any) -> str:
  """A value as Python writes it, cut to what fits a message."""
  try:
    text = repr(value)
  except RecursionError:
    text = type(value).__name__
  return text if len(text) <= 80 else f"{text[:77]}..."
