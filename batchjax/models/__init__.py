"""Models: one transformer, and for each family how to read its config and names."""

import types
from collections.abc import Mapping
from typing import Any

from batchjax.config import ConfigError, ModelConfig
from batchjax.models import gemma2, gemma3, llama, mistral, qwen2, qwen3, settings
from batchjax.models.names import Target
from batchjax.models.shapes import SHAPES
from batchjax.models.transformer import Transformer, init_params

__all__ = ("FAMILIES", "SHAPES", "Target", "Transformer", "config_from_hf", "init_params",
           "name_map")

# By Hugging Face `model_type`, which is also `ModelConfig.family`.
FAMILIES: Mapping[str, types.ModuleType] = types.MappingProxyType({
    "llama": llama, "mistral": mistral, "qwen2": qwen2, "qwen3": qwen3,
    "gemma2": gemma2, "gemma3_text": gemma3})


def config_from_hf(hf_config: Mapping[str, Any]) -> ModelConfig:
  """The model of a Hugging Face `config.json`, in float32.

  Raises:
    ConfigError: its `model_type` is unknown, a setting is missing or wrong, or asks for
      something we do not compute.
  """
  family = _family(hf_config.get("model_type"))
  settings.check(hf_config, family.COMPUTES)
  return family.config_from_hf(hf_config)


def name_map(config: ModelConfig) -> dict[str, Target]:
  """Hugging Face tensor name to where the tensor goes; covers every parameter once."""
  return _family(config.family).name_map(config)


def _family(model_type: Any) -> types.ModuleType:
  if not isinstance(model_type, str) or model_type not in FAMILIES:
    raise ConfigError(f"config.json: model_type {settings.short(model_type)} is unknown; "
                      f"known: {sorted(FAMILIES)}")
  return FAMILIES[model_type]
