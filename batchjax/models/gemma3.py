"""Gemma 3 text: q and k norms, five local layers to a global one, a rope base for each kind."""

from collections.abc import Mapping
from typing import Any

from batchjax.config import ConfigError, ModelConfig
from batchjax.models import gemma2, llama, settings

name_map = gemma2.name_map
COMPUTES = gemma2.COMPUTES | {"rope_local_base_freq", "sliding_window_pattern",
                              "_sliding_window_pattern", "qk_norm", "use_qk_norm"}

_DEFAULTS = dict(tie_word_embeddings=True, hidden_activation="gelu_pytorch_tanh", head_dim=256,
                 max_position_embeddings=131_072, bos_token_id=2, eos_token_id=1)


def config_from_hf(hf_config: Mapping[str, Any]) -> ModelConfig:
  """The model of a Hugging Face `config.json`; ConfigError where it cannot be computed."""
  # Newer files hold rope settings per layer type; older ones name the local base beside them.
  base = float(hf_config.get("rope_theta") or 1_000_000.0)
  if by_kind := hf_config.get("rope_parameters"):
    for kind in ("full_attention", "sliding_attention"):
      if not isinstance(by_kind.get(kind), dict):
        raise ConfigError(f"config.json: rope_parameters lacks {kind}, an object: fetch the file again")
    theta, scaling = settings.rope(by_kind["full_attention"], base, "rope_parameters.full_attention")
    local_theta, local_scaling = settings.rope(by_kind["sliding_attention"], 10_000.0,
                                               "rope_parameters.sliding_attention")
    if local_scaling is not None:
      raise ConfigError("config.json: rope_parameters.sliding_attention: scaling is not supported "
                        f"there, got {local_scaling.kind!r}: take another model")
  else:
    theta, scaling = settings.rope(hf_config.get("rope_scaling") or {}, base, "rope_scaling")
    local_theta = float(hf_config.get("rope_local_base_freq") or 10_000.0)
  period = (hf_config.get("sliding_window_pattern") or hf_config.get("_sliding_window_pattern") or 6)
  fields = llama.common_fields({**hf_config, "rope_parameters": None, "rope_scaling": None},
                               **_DEFAULTS)
  return ModelConfig(
      **fields | dict(rope_theta=theta, rope_scaling=scaling, rope_local_theta=local_theta),
      **gemma2.gemma_fields(hf_config), qk_norm=True,
      sliding_window=hf_config.get("sliding_window", 4096),
      layer_kinds=llama.layer_kinds(hf_config, lambda i: (i + 1) % period != 0),
      attn_soft_cap=hf_config.get("attn_logit_softcapping"),
      final_soft_cap=hf_config.get("final_logit_softcapping"))
