"""Mistral: a Llama with a sliding window on all layers, where the config has one."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from batchjax.config import ModelConfig
from batchjax.models import llama

name_map = llama.name_map


def config_from_hf(hf_config: Mapping[str, Any]) -> ModelConfig:
  """The model of a Hugging Face `config.json`; ConfigError where it cannot be computed."""
  config = llama.config_from_hf(hf_config)
  window = hf_config.get("sliding_window", 4096)
  if window is None:
    return config
  return dataclasses.replace(config, sliding_window=window,
                             layer_kinds=("local",) * config.num_layers)
