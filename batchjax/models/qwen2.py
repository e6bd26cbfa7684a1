"""Qwen2 and Qwen2.5: a Llama with biases on q, k and v."""

from collections.abc import Mapping
from typing import Any

from batchjax.config import ModelConfig
from batchjax.models import llama

name_map = llama.name_map
WINDOW = frozenset({"sliding_window", "use_sliding_window", "layer_types"})
# Its q, k and v have biases whatever this says, as in transformers.
COMPUTES = WINDOW | {"attention_bias"}


def config_from_hf(hf_config: Mapping[str, Any]) -> ModelConfig:
  """The model of a Hugging Face `config.json`; ConfigError where it cannot be computed."""
  return ModelConfig(**llama.common_fields(hf_config), **window_fields(hf_config), qkv_bias=True)


def window_fields(hf_config: Mapping[str, Any]) -> dict[str, Any]:
  """Sliding window of Qwen models: off unless `use_sliding_window`, never on the first layers."""
  window = hf_config.get("sliding_window", 4096)
  if not hf_config.get("use_sliding_window") or window is None:
    return dict(layer_kinds=llama.layer_kinds(hf_config, lambda i: False))
  first = hf_config.get("max_window_layers")
  first = 28 if first is None else first
  return dict(sliding_window=window,
              layer_kinds=llama.layer_kinds(hf_config, lambda i: i >= first))
