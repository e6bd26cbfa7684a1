"""Qwen3: norms on q and k, its own head_dim, no biases."""

from collections.abc import Mapping
from typing import Any

from batchjax.config import ModelConfig
from batchjax.models import llama, qwen2

name_map = llama.name_map
COMPUTES = qwen2.WINDOW | {"qk_norm", "use_qk_norm"}


def config_from_hf(hf_config: Mapping[str, Any]) -> ModelConfig:
  """The model of a Hugging Face `config.json`; ConfigError where it cannot be computed."""
  return ModelConfig(**llama.common_fields(hf_config, head_dim=128),
                     **qwen2.window_fields(hf_config), qk_norm=True)
