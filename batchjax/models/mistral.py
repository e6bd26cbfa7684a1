"""Mistral: a Llama with a sliding window on all layers, where the config has one."""

from collections.abc import Mapping
from typing import Any

from batchjax.config import ModelConfig
from batchjax.models import llama

name_map = llama.name_map
COMPUTES = frozenset({"sliding_window", "layer_types"})


def config_from_hf(hf_config: Mapping[str, Any]) -> ModelConfig:
  """The model of a Hugging Face `config.json`; ConfigError where it cannot be computed."""
  window = hf_config.get("sliding_window", 4096)
  return ModelConfig(
      **llama.common_fields(hf_config, bos_token_id=1, eos_token_id=2), sliding_window=window,
      layer_kinds=llama.layer_kinds(hf_config, lambda i: window is not None))
