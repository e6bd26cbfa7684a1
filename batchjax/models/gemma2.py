"""Gemma 2: soft caps, local and global layers in turn, norms on both sides of each block."""

from collections.abc import Mapping
from typing import Any

from batchjax.config import ModelConfig
from batchjax.models import llama
from batchjax.models.names import Target, decoder_map

COMPUTES = frozenset({"sliding_window", "layer_types", "attn_logit_softcapping",
                      "final_logit_softcapping", "query_pre_attn_scalar"})

_DEFAULTS = dict(tie_word_embeddings=True, hidden_activation="gelu_pytorch_tanh", head_dim=256,
                 max_position_embeddings=8192, bos_token_id=2, eos_token_id=1)


def config_from_hf(hf_config: Mapping[str, Any]) -> ModelConfig:
  """The model of a Hugging Face `config.json`; ConfigError where it cannot be computed."""
  return ModelConfig(
      **llama.common_fields(hf_config, **_DEFAULTS), **gemma_fields(hf_config),
      sliding_window=hf_config.get("sliding_window", 4096),
      layer_kinds=llama.layer_kinds(hf_config, lambda i: i % 2 == 0),
      attn_soft_cap=hf_config.get("attn_logit_softcapping", 50.0),
      final_soft_cap=hf_config.get("final_logit_softcapping", 30.0))


def gemma_fields(hf_config: Mapping[str, Any]) -> dict[str, Any]:
  """What Gemma 2 and 3 share."""
  return dict(norm_plus_one=True, post_norms=True, embed_scale=hf_config["hidden_size"] ** 0.5,
              query_scale=(hf_config.get("query_pre_attn_scalar") or 256) ** -0.5)


def name_map(config: ModelConfig) -> dict[str, Target]:
  """Where each Hugging Face tensor goes."""
  return decoder_map(config, ffn_norm="pre_feedforward_layernorm",
                     post_norms={"post_attn_norm": "post_attention_layernorm",
                                 "post_ffn_norm": "post_feedforward_layernorm"})
