"""Llama 2 and 3, SmolLM2, and the fields that every other family starts from."""

from collections.abc import Callable, Mapping
from typing import Any

from batchjax.config import ConfigError, ModelConfig, RopeScaling
from batchjax.models import settings
from batchjax.models.names import Target, decoder_map

# Settings that change the numbers and that are computed; see `settings.check`.
COMPUTES = frozenset[str]()


def config_from_hf(hf_config: Mapping[str, Any]) -> ModelConfig:
  """The model of a Hugging Face `config.json`.

  Raises:
    ConfigError: it asks for something this family does not compute.
  """
  heads = hf_config.get("num_attention_heads")
  return ModelConfig(**common_fields(hf_config, num_key_value_heads=heads, bos_token_id=1,
                                     eos_token_id=2))


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
  # Families differ in what an absent one means; null means one for each query head.
  if "num_key_value_heads" not in hf_config and hf.get("num_key_value_heads") is None:
    missing.append("num_key_value_heads")
  if missing:
    raise ConfigError(f"config.json lacks {missing}: fetch the file again")
  activations = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
  # Gemma 2 and 3 name theirs `hidden_activation`; an old `hidden_act` beside it is not read.
  act = hf.get("hidden_activation", hf["hidden_act"])
  if act not in activations:
    raise ConfigError(f"config.json: activation {act!r} is unknown; known: {sorted(activations)}")
  # For these two null means none, and only an absent setting takes the default.
  bos = hf_config.get("bos_token_id", defaults.get("bos_token_id"))
  eos = hf_config.get("eos_token_id", defaults.get("eos_token_id"))
  eos = () if eos is None else eos
  head_dim = hf.get("head_dim", hf["hidden_size"] // hf["num_attention_heads"])
  if not head_dim or head_dim % 2:
    raise ConfigError(f"config.json: head_dim={head_dim} must be even and above 0: rope turns its halves")
  theta, scaling = rope_of(hf_config, float(hf.get("rope_theta", 10_000.0)))
  return dict(
      family=hf["model_type"],
      vocab_size=hf["vocab_size"],
      hidden_size=hf["hidden_size"],
      ffn_size=hf["intermediate_size"],
      num_layers=hf["num_hidden_layers"],
      num_heads=hf["num_attention_heads"],
      num_kv_heads=hf.get("num_key_value_heads") or hf["num_attention_heads"],
      head_dim=head_dim,
      max_len=hf["max_position_embeddings"],
      norm_eps=hf["rms_norm_eps"],
      rope_theta=theta,
      rope_scaling=scaling,
      tie_embeddings=hf["tie_word_embeddings"],
      activation=activations[act],
      bos_token_id=bos,
      eos_token_ids=(eos,) if isinstance(eos, int) else tuple(eos))


def rope_of(hf_config: Mapping[str, Any], theta: float) -> tuple[float, RopeScaling | None]:
  """Rope base and scaling, from the newer `rope_parameters` or the older `rope_scaling`.

  Args:
    hf_config: contents of `config.json`.
    theta: the base where the object does not name it.

  Raises:
    ConfigError: the scaling cannot be computed, or the two contradict each other.
  """
  names = [name for name in ("rope_parameters", "rope_scaling") if hf_config.get(name)]
  found = [settings.rope(hf_config[name], theta, name) for name in names]
  if len(set(found)) > 1:
    raise ConfigError(f"config.json: {names} contradict each other: remove the wrong one")
  return found[0] if found else (theta, None)


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
