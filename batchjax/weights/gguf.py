"""Reads GGUF files: metadata as a Hugging Face config, tensors under Hugging Face names."""

import math
import pathlib
from collections.abc import Iterable
from typing import Any

import gguf
import numpy as np

from batchjax.weights.stored import StoredTensors, WeightError

# GGUF architecture -> model_type and class of its Hugging Face config.
_ARCHS = {
    "llama": ("llama", "LlamaForCausalLM"),
    "qwen2": ("qwen2", "Qwen2ForCausalLM"),
    "qwen3": ("qwen3", "Qwen3ForCausalLM"),
    "gemma2": ("gemma2", "Gemma2ForCausalLM"),
    "gemma3": ("gemma3_text", "Gemma3ForCausalLM"),
}
_GEMMA = ("gemma2", "gemma3")
# Layers of the models whose queries are scaled by hidden_size / num_heads, not by head_dim.
_GEMMA_27B_LAYERS = {"gemma2": 46, "gemma3": 62}
_ROPE_FREQS = "rope_freqs.weight"


class GgufFile:
  """One GGUF file; the constructor parses its metadata and reads no tensor.

  Raises:
    WeightError: the architecture is not supported, or the file is cut short.
  """

  def __init__(self, path: pathlib.Path):
    self._path = path
    try:
      self._reader = gguf.GGUFReader(path)
    except (ValueError, IndexError) as error:  # does not name the file
      raise WeightError(f"{path} is damaged or incomplete ({error}); fetch it again") from error
    self._tensors = {t.name: t for t in self._reader.tensors}
    self.arch = self._field("general.architecture")
    if self.arch not in _ARCHS:
      raise WeightError(f"{path}: architecture {self.arch!r} is not supported; "
                        f"supported: {sorted(_ARCHS)}")

  def _field(self, key: str, default: Any = None) -> Any:
    field = self._reader.get_field(key)
    return default if field is None else field.contents()

  def _arch_field(self, key: str, default: Any = None) -> Any:
    return self._field(f"{self.arch}.{key}", default)

  def hf_config(self) -> dict[str, Any]:
    """The metadata as the `config.json` of the same model.

    Raises:
      WeightError: a metadata key is missing, or a rope scaling cannot be expressed.
    """
    get = self._arch_field
    required = ("block_count", "embedding_length", "feed_forward_length", "attention.head_count",
                "context_length", "attention.layer_norm_rms_epsilon")
    for key in required:
      if get(key) is None:
        raise WeightError(f"{self._path}: lacks the metadata key {self.arch}.{key}")
    if "token_embd.weight" not in self._tensors:
      raise WeightError(f"{self._path}: lacks the tensor token_embd.weight")
    model_type, class_name = _ARCHS[self.arch]
    hidden_size, num_heads = get("embedding_length"), get("attention.head_count")
    head_dim = get("attention.key_length") or hidden_size // num_heads
    end_ids = [self._field(f"tokenizer.ggml.{k}_token_id") for k in ("eos", "eot", "eom")]
    theta = get("rope.freq_base", 10_000.0)
    config = {
        "model_type": model_type,
        "architectures": [class_name],
        "vocab_size": int(self._tensors["token_embd.weight"].shape[1]),
        "hidden_size": hidden_size,
        "intermediate_size": get("feed_forward_length"),
        "num_hidden_layers": get("block_count"),
        "num_attention_heads": num_heads,
        "num_key_value_heads": get("attention.head_count_kv") or num_heads,
        "head_dim": head_dim,
        "max_position_embeddings": get("context_length"),
        # Metadata floats are float32: 1e-6 would read back as 9.99999997e-07.
        "rms_norm_eps": _shortest(get("attention.layer_norm_rms_epsilon")),
        "rope_theta": _shortest(theta),
        "rope_scaling": self._rope_scaling(theta, head_dim),
        "tie_word_embeddings": "output.weight" not in self._tensors,
        "bos_token_id": self._field("tokenizer.ggml.bos_token_id"),
        "eos_token_id": list(dict.fromkeys(i for i in end_ids if i is not None)),
    }
    if self.arch in _GEMMA:
      is_27b = config["num_hidden_layers"] == _GEMMA_27B_LAYERS[self.arch]
      config |= {
          "hidden_activation": "gelu_pytorch_tanh",
          "query_pre_attn_scalar": hidden_size // num_heads if is_27b else head_dim,
          "sliding_window": get("attention.sliding_window"),
          "attn_logit_softcapping": _shortest(get("attn_logit_softcapping")),
          "final_logit_softcapping": _shortest(get("final_logit_softcapping")),
      }
    if self.arch == "gemma3":
      config |= {
          "rope_local_base_freq": _shortest(get("rope.freq_base_swa", 10_000.0)),
          "sliding_window_pattern": 6,
      }
    return {key: value for key, value in config.items() if value is not None}

  def _rope_scaling(self, theta: float, head_dim: int) -> dict[str, Any] | None:
    kind = self._arch_field("rope.scaling.type", "none")
    if kind == "linear":
      return {"rope_type": "linear", "factor": self._arch_field("rope.scaling.factor")}
    if kind != "none":
      raise WeightError(f"{self._path}: rope scaling {kind!r} is not supported")
    if _ROPE_FREQS not in self._tensors:
      return None
    # Llama 3.1 and later store the divisor of every frequency instead of the rule behind them.
    divisors = self._read(_ROPE_FREQS)
    scaling = {
        "rope_type": "llama3",
        "factor": float(divisors.max()),
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    if not np.allclose(divisors, _llama3_divisors(scaling, theta, head_dim), rtol=1e-4):
      raise WeightError(f"{self._path}: {_ROPE_FREQS} does not follow {scaling}; "
                        "load the Hugging Face folder of this model instead")
    return scaling

  def tensors(self, hf_names: Iterable[str]) -> StoredTensors:
    """The file's tensors under the given names; those none of them claims keep their own."""
    name_map = gguf.get_tensor_name_map(
        next(k for k, v in gguf.MODEL_ARCH_NAMES.items() if v == self.arch),
        self._arch_field("block_count"))
    own_names = {}
    for name in hf_names:
      stem, _, kind = name.rpartition(".")
      own_names[name] = f"{name_map.get_name(stem)}.{kind}"
    hf_names_of = {own: name for name, own in own_names.items()}
    return StoredTensors(
        shapes={hf_names_of.get(own, own): tuple(int(n) for n in reversed(t.shape))
                for own, t in self._tensors.items() if own != _ROPE_FREQS},
        read=lambda name: self._to_hf(name, self._read(own_names[name])),
        locate=lambda name: f"{self._path} ({own_names.get(name, name)})")

  def _read(self, own_name: str) -> np.ndarray:
    tensor = self._tensors[own_name]
    # Not `tensor.data`: the pages of the mapped file would count as ours until it is closed.
    raw = np.fromfile(self._path, tensor.data.dtype, tensor.data.size,
                      offset=tensor.data_offset).reshape(tensor.data.shape)
    return gguf.dequantize(raw, tensor.tensor_type)

  def _to_hf(self, name: str, tensor: np.ndarray) -> np.ndarray:
    if self.arch == "llama" and ".self_attn." in name:
      num_heads = self._arch_field("attention.head_count")
      num_kv_heads = self._arch_field("attention.head_count_kv", num_heads)
      heads = {"q_proj": num_heads, "k_proj": num_kv_heads}.get(name.split(".")[-2])
      return tensor if heads is None else unpermute_rope(tensor, heads)
    if self.arch in _GEMMA and name.endswith("norm.weight"):
      return tensor - 1
    return tensor


def unpermute_rope(weight: np.ndarray, num_heads: int) -> np.ndarray:
  """Rows [num_heads * head_dim, ...] from interleaved rotary pairs to two halves."""
  pairs = weight.reshape(num_heads, weight.shape[0] // num_heads // 2, 2, *weight.shape[1:])
  return pairs.swapaxes(1, 2).reshape(weight.shape)


def _llama3_divisors(scaling: dict[str, Any], theta: float, head_dim: int) -> np.ndarray:
  """What Llama 3.1 divides each of the head_dim / 2 frequencies by."""
  wavelens = 2 * math.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
  low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
  ratio = scaling["original_max_position_embeddings"] / wavelens
  smooth = np.clip((ratio - low) / (high - low), 0, 1)
  return 1 / ((1 - smooth) / scaling["factor"] + smooth)


def _shortest(value: float | None) -> float | None:
  """The shortest decimal that is the same float32."""
  return None if value is None else float(str(np.float32(value)))
