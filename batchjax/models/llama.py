"""Llama 2 and 3, SmolLM2, and the fields that every other family starts from."""

from collections.abc import Callable, Mapping
from typing import Any

from batchjax.config import ConfigError, ModelConfig, RopeScaling
from batchjax.models.names import Target, decoder_map


def config_from_hf(hf_config: Mapping[str, Any]) -> ModelConfig:
  """The model of a Hugging Face `config.json`.

  Raises:
    ConfigError: it asks for something this family does not compute.
  """
  for name in ("attention_bias", "mlp_bias"):
    if hf_config.get(name):
      raise ConfigError(f"config.json: {name}=true is not supported for model_type "
                        f"{hf_config['model_type']!r}")
  return ModelConfig(**common_fields(hf_config, bos_token_id=1, eos_token_id=2))


def name_map(config: ModelConfig) -> dict[str, Target]:
  """Where each Hugging Face tensor goes."""
  return decoder_map(config)


def common_fields(hf_config: Mapping[str, Any], **defaults: Any) -> dict[str, Any]:
  """Fields of `ModelConfig` that all families read alike.

  Args:
    hf_config: contents of `config.json`.
    **defaults: what the family's Hugging Face class takes for absent settings.

  Raises:
    ConfigError: a setting is missing or unknown.
  """
  hf = {"rms_norm_eps": 1e-6, "hidden_act": "silu", "tie_word_embeddings": False} | defaults
  hf |= {name: value for name, value in hf_config.items() if value is not None}
  needed = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
            "num_attention_heads", "max_position_embeddings")
  missing = [name for name in needed if name not in hf]
  if missing:
    raise ConfigError(f"config.json lacks {missing}")
  activations = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
  # Gemma 2 and 3 name theirs `hidden_activation`; an old `hidden_act` beside it is not read.
  act = hf.get("hidden_activation", hf["hidden_act"])
  if act not in activations:
    raise ConfigError(f"config.json: activation {act!r} is unknown; known: {sorted(activations)}")
  # For these two null means none, and only an absent setting takes the default.
  bos = hf_config.get("bos_token_id", defaults.get("bos_token_id"))
  eos = hf_config.get("eos_token_id", defaults.get("eos_token_id"))
  eos = () if eos is None else eos
  theta, scaling = rope_fields(hf.get("rope_parameters") or hf.get("rope_scaling") or {},
                               float(hf.get("rope_theta", 10_000.0)))
  return dict(
      family=hf["model_type"],
      vocab_size=hf["vocab_size"],
      hidden_size=hf["hidden_size"],
      ffn_size=hf["intermediate_size"],
      num_layers=hf["num_hidden_layers"],
      num_heads=hf["num_attention_heads"],
      num_kv_heads=hf.get("num_key_value_heads", hf["num_attention_heads"]),
      head_dim=hf.get("head_dim", hf["hidden_size"] // hf["num_attention_heads"]),
      max_len=hf["max_position_embeddings"],
      norm_eps=hf["rms_norm_eps"],
      rope_theta=theta,
      rope_scaling=scaling,
      tie_embeddings=hf["tie_word_embeddings"],
      activation=activations[act],
      bos_token_id=bos,
      eos_token_ids=(eos,) if isinstance(eos, int) else tuple(eos))


def rope_fields(rope: Mapping[str, Any], theta: float) -> tuple[float, RopeScaling | None]:
  """Rope base and scaling of `rope_parameters` or of the older `rope_scaling`.

  Args:
    rope: the setting; empty is plain rope.
    theta: the base where `rope` does not name it.

  Raises:
    ConfigError: the scaling is of an unknown type.
  """
  theta = float(rope.get("rope_theta", theta))
  kind = rope.get("rope_type", rope.get("type", "default"))
  if rope.get("partial_rotary_factor", 1.0) != 1.0:
    raise ConfigError("config.json: rope over a part of the head is not supported")
  if kind == "default":
    return theta, None
  if kind == "linear":
    return theta, RopeScaling("linear", float(rope["factor"]))
  if kind == "llama3":
    return theta, RopeScaling(
        "llama3", float(rope["factor"]), float(rope["low_freq_factor"]),
        float(rope["high_freq_factor"]), int(rope["original_max_position_embeddings"]))
  raise ConfigError(f"config.json: rope type {kind!r} is unknown; "
                    "known: ['default', 'linear', 'llama3']")


def layer_kinds(hf_config: Mapping[str, Any],
                is_local: Callable[[int], bool]) -> tuple[str, ...]:
  """Kind of each layer: `layer_types` if given, else by `is_local(layer index)`."""
  if hf_config.get("layer_types"):
    kinds = {"full_attention": "global", "sliding_attention": "local"}
    unknown = sorted(set(hf_config["layer_types"]) - set(kinds))
    if unknown:
      raise ConfigError(f"config.json: layer_types {unknown} are unknown; known: {sorted(kinds)}")
    return tuple(kinds[kind] for kind in hf_config["layer_types"])
  return tuple("local" if is_local(i) else "global"
               for i in range(hf_config["num_hidden_layers"]))
