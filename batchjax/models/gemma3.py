"""Gemma 3 text: q and k norms, five local layers to a global one, a rope base for each kind."""

from collections.abc import Mapping
from typing import Any

from batchjax.config import ConfigError, ModelConfig
from batchjax.models import gemma2, llama

name_map = gemma2.name_map

_DEFAULTS = dict(tie_word_embeddings=True, hidden_activation="gelu_pytorch_tanh", head_dim=256,
                 max_position_embeddings=131_072, bos_token_id=2, eos_token_id=1)


def config_from_hf(hf_config: Mapping[str, Any]) -> ModelConfig:
  """The model of a Hugging Face `config.json`; ConfigError where it cannot be computed."""
  # Newer files hold rope settings per layer type; older ones name the local base beside them.
  if "rope_parameters" in hf_config:
    global_rope = hf_config["rope_parameters"]["full_attention"]
    local_rope = hf_config["rope_parameters"]["sliding_attention"]
  else:
    global_rope = hf_config.get("rope_scaling") or {}
    local_rope = {"rope_theta": hf_config.get("rope_local_base_freq", 10_000.0)}
  theta, scaling = llama.rope_fields(
      global_rope, float(hf_config.get("rope_theta", 1_000_000.0)))
  local_theta, local_scaling = llama.rope_fields(local_rope, 10_000.0)
  if local_scaling is not None:
    raise ConfigError("config.json: rope scaling of sliding_attention layers is not supported")
  period = hf_config.get("sliding_window_pattern", 6)
  fields = llama.common_fields({**hf_config, "rope_parameters": None, "rope_scaling": None},
                               **_DEFAULTS)
  return ModelConfig(
      **fields | dict(rope_theta=theta, rope_scaling=scaling, rope_local_theta=local_theta),
      **gemma2.gemma_fields(hf_config), qk_norm=True,
      sliding_window=hf_config.get("sliding_window", 4096),
      layer_kinds=llama.layer_kinds(hf_config, lambda i: (i + 1) % period != 0),
      attn_soft_cap=hf_config.get("attn_logit_softcapping"),
      final_soft_cap=hf_config.get("final_logit_softcapping"))
