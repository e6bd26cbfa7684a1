"""Known shapes: real models, and a tiny one of each family for tests and demos."""

import dataclasses
import types
from collections.abc import Mapping

from batchjax.config import ModelConfig, RopeScaling

_LLAMA3 = ModelConfig(
    family="llama", vocab_size=128_256, hidden_size=4096, ffn_size=14_336, num_layers=32,
    num_heads=32, num_kv_heads=8, head_dim=128, max_len=8192, rope_theta=500_000.0,
    bos_token_id=128_000, eos_token_ids=(128_001, 128_009))

_TINY = ModelConfig(
    family="llama", vocab_size=256, hidden_size=32, ffn_size=64, num_layers=2, num_heads=4,
    num_kv_heads=2, head_dim=8, max_len=1024, bos_token_id=1, eos_token_ids=(2,))

_TINY_GEMMA2 = dataclasses.replace(
    _TINY, family="gemma2", norm_eps=1e-6, tie_embeddings=True, activation="gelu_tanh",
    post_norms=True, norm_plus_one=True, embed_scale=32 ** 0.5, query_scale=16 ** -0.5,
    attn_soft_cap=50.0, final_soft_cap=30.0, sliding_window=8, layer_kinds=("local", "global"))

SHAPES: Mapping[str, ModelConfig] = types.MappingProxyType({
    "smollm2_135m": ModelConfig(
        family="llama", vocab_size=49_152, hidden_size=576, ffn_size=1536, num_layers=30,
        num_heads=9, num_kv_heads=3, head_dim=64, max_len=8192, rope_theta=100_000.0,
        tie_embeddings=True, bos_token_id=1, eos_token_ids=(2,)),
    "llama3_2_1b": dataclasses.replace(
        _LLAMA3, hidden_size=2048, ffn_size=8192, num_layers=16, layer_kinds=(), head_dim=64,
        max_len=131_072, tie_embeddings=True, eos_token_ids=(128_001, 128_008, 128_009),
        rope_scaling=RopeScaling("llama3", 32.0, 1.0, 4.0, 8192)),
    "llama3_8b": _LLAMA3,
    "qwen3_0_6b": ModelConfig(
        family="qwen3", vocab_size=151_936, hidden_size=1024, ffn_size=3072, num_layers=28,
        num_heads=16, num_kv_heads=8, head_dim=128, max_len=40_960, norm_eps=1e-6,
        rope_theta=1_000_000.0, tie_embeddings=True, qk_norm=True, bos_token_id=151_643,
        eos_token_ids=(151_645, 151_643)),
    "tiny_llama": _TINY,
    "tiny_mistral": dataclasses.replace(
        _TINY, family="mistral", sliding_window=8, layer_kinds=("local", "local")),
    "tiny_qwen2": dataclasses.replace(_TINY, family="qwen2", norm_eps=1e-6, qkv_bias=True),
    "tiny_qwen3": dataclasses.replace(
        _TINY, family="qwen3", norm_eps=1e-6, head_dim=16, tie_embeddings=True, qk_norm=True),
    "tiny_gemma2": _TINY_GEMMA2,
    "tiny_gemma3": dataclasses.replace(
        _TINY_GEMMA2, family="gemma3_text", qk_norm=True, attn_soft_cap=None, final_soft_cap=None,
        num_layers=3, layer_kinds=("local", "local", "global"), rope_theta=1_000_000.0,
        rope_local_theta=10_000.0, rope_scaling=RopeScaling("linear", 8.0)),
})
