"""Reads GGUF files: metadata as a Hugging Face config, tensors under Hugging Face names."""

import math
import pathlib
from collections.abc import Iterable
from typing import Any

import gguf
import numpy as np

from batchjax.model_files import damaged, open_gguf
from batchjax.models.settings import MAX_LAYERS
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
# Keys of the architecture that `GgufFile` reads,
_READ = frozenset({
    "block_count", "embedding_length", "feed_forward_length", "context_length",
    "attention.head_count", "attention.head_count_kv", "attention.layer_norm_rms_epsilon",
    "attention.key_length", "attention.value_length", "rope.freq_base", "rope.dimension_count",
    "rope.scaling.type", "rope.scaling.factor", "attention.sliding_window"})
_READ_GEMMA = frozenset({"attn_logit_softcapping", "final_logit_softcapping",
                         "attention.sliding_window_pattern"})
# those that say nothing about the numbers,
_SILENT = frozenset({"vocab_size", "tensor_data_layout", "rope.scaling.original_context_length",
                     "rope.scaling.finetuned"})
# and those that do, with the values at which they change nothing. All others are refused.
_NEUTRAL = {
    "rope.scale_linear": (0, 1), "rope.scaling.attn_factor": (0, 1), "rope.scaling.alpha": (0,),
    "rope.scaling.yarn_log_multiplier": (0,), "attention.causal": (True,),
    "attention.clamp_kqv": (0,), "attention.max_alibi_bias": (0,), "logit_scale": (0, 1),
    "residual_scale": (0, 1), "embedding_scale": (0, 1), "attention.scale": (0,),
    "expert_count": (0,), "expert_used_count": (0,), "use_parallel_residual": (False,),
    "nextn_predict_layers": (0,), "pooling_type": (0,), "attn_logit_softcapping": (0,),
    "final_logit_softcapping": (0,)}


class GgufFile:
  """One GGUF file; the constructor parses its metadata and reads no tensor.

  Raises:
    ConfigError: the file is damaged or cut short.
    WeightError: the architecture is not supported, or a key of it is not understood.
  """

  def __init__(self, path: pathlib.Path):
    self._path = path
    self._reader = open_gguf(path)
    self._tensors = {t.name: t for t in self._reader.tensors}
    self.arch = self._field("general.architecture")
    if not isinstance(self.arch, str) or self.arch not in _ARCHS:
      raise WeightError(f"{path}: architecture {self.arch!r} is not supported; "
                        f"supported: {sorted(_ARCHS)}")
    self._check_keys()

  def _check_keys(self) -> None:
    """Refuses what the architecture says and nothing here reads."""
    read = _READ | (_READ_GEMMA if self.arch in _GEMMA else set())
    read |= {"rope.freq_base_swa"} if self.arch == "gemma3" else set()
    for full in self._reader.fields:
      key = full.removeprefix(f"{self.arch}.")
      if key == full or key in read or key in _SILENT or self._field(full) in _NEUTRAL.get(key, ()):
        continue
      raise self._error(full, "is not understood here: load the model's Hugging Face folder instead")

  def _error(self, key: str, message: str) -> WeightError:
    value = repr(self._field(key))
    return WeightError(f"{self._path}: {key}={value if len(value) < 80 else value[:77] + '...'} {message}")

  def _field(self, key: str, default: Any = None) -> Any:
    field = self._reader.get_field(key)
    try:
      return default if field is None else field.contents()
    except (ValueError, IndexError) as error:
      raise damaged(self._path, error) from error

  def _arch_field(self, key: str, default: Any = None) -> Any:
    return self._field(f"{self.arch}.{key}", default)

  def _integer(self, key: str, default: int | None = None, least: int = 1, most: int = 2**31 - 1,
               ) -> int | None:
    value = self._field(key, default)
    if value is not None and not (type(value) is int and least <= value <= most):
      raise self._error(key, f"must be an integer from {least} to {most}: fetch the file again")
    return value

  def _number(self, key: str, default: float | None = None) -> float | None:
    """A float as written: metadata floats are float32, 1e-6 would read back as 9.99999997e-07."""
    value = self._arch_field(key, default)
    if value is not None and not (type(value) in (int, float) and 0 < value < math.inf):
      raise self._error(f"{self.arch}.{key}", "must be a number above 0: fetch the file again")
    return None if value is None else float(str(np.float32(value)))

  def hf_config(self) -> dict[str, Any]:
    """The metadata as the `config.json` of the same model.

    Raises:
      WeightError: a metadata key is missing or wrong, or a rope scaling cannot be expressed.
    """
    get = lambda key, default=None: self._integer(f"{self.arch}.{key}", default)
    required = ("block_count", "embedding_length", "feed_forward_length", "attention.head_count",
                "context_length", "attention.layer_norm_rms_epsilon")
    for key in required:
      if self._arch_field(key) is None:
        raise WeightError(f"{self._path}: lacks the metadata key {self.arch}.{key}: fetch the file again")
    shape = self._tensors["token_embd.weight"].shape if "token_embd.weight" in self._tensors else ()
    if len(shape) != 2:
      raise WeightError(f"{self._path}: lacks the tensor token_embd.weight, a matrix: fetch the file again")
    vocab_size = int(shape[1])
    model_type, class_name = _ARCHS[self.arch]
    hidden_size, num_heads = get("embedding_length"), get("attention.head_count")
    head_dim = get("attention.key_length") or hidden_size // num_heads
    for key in ("attention.value_length", "rope.dimension_count"):
      if get(key, head_dim) != head_dim:
        raise self._error(f"{self.arch}.{key}", f"differs from the size of a head, {head_dim}, which is "
                          "not supported: take another model")
    ids = {name: self._integer(f"tokenizer.ggml.{name}_token_id", least=0, most=vocab_size - 1)
           for name in ("bos", "eos", "eot", "eom")}
    theta = self._number("rope.freq_base", 10_000.0)
    config = {
        "model_type": model_type,
        "architectures": [class_name],
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "intermediate_size": get("feed_forward_length"),
        "num_hidden_layers": self._integer(f"{self.arch}.block_count", most=MAX_LAYERS),
        "num_attention_heads": num_heads,
        "num_key_value_heads": get("attention.head_count_kv") or num_heads,
        "head_dim": head_dim,
        "max_position_embeddings": get("context_length"),
        "rms_norm_eps": self._number("attention.layer_norm_rms_epsilon"),
        "rope_theta": theta,
        "rope_scaling": self._rope_scaling(theta, head_dim),
        "tie_word_embeddings": "output.weight" not in self._tensors,
        "bos_token_id": ids["bos"],
        "eos_token_id": list(dict.fromkeys(
            i for name, i in ids.items() if name != "bos" and i is not None)),
    }
    window = self._integer(f"{self.arch}.attention.sliding_window", least=0)
    if self.arch in _GEMMA:
      is_27b = config["num_hidden_layers"] == _GEMMA_27B_LAYERS[self.arch]
      config |= {
          "hidden_activation": "gelu_pytorch_tanh",
          "query_pre_attn_scalar": hidden_size // num_heads if is_27b else head_dim,
          "sliding_window": window,
          "attn_logit_softcapping": self._number("attn_logit_softcapping"),
          "final_logit_softcapping": self._number("final_logit_softcapping"),
          **self._window_pattern(config["num_hidden_layers"]),
      }
    elif window and window < config["max_position_embeddings"]:
      raise self._error(f"{self.arch}.attention.sliding_window", "is not supported for this "
                        "architecture: load the model's Hugging Face folder instead")
    if self.arch == "gemma3":
      config |= {"rope_local_base_freq": self._number("rope.freq_base_swa", 10_000.0)}
    return {key: value for key, value in config.items() if value is not None}

  def _window_pattern(self, num_layers: int) -> dict[str, Any]:
    """Which layers have a window: the architecture's own, a period, or a flag for each layer."""
    key = f"{self.arch}.attention.sliding_window_pattern"
    pattern = self._field(key, 6 if self.arch == "gemma3" else 2)
    if type(pattern) is int and pattern >= 1:
      pattern = [(i + 1) % pattern != 0 for i in range(num_layers)]
    if not (isinstance(pattern, list) and len(pattern) == num_layers
            and all(type(flag) is bool for flag in pattern)):
      raise self._error(key, f"must be a period or a flag for each of {num_layers} layers: "
                        "fetch the file again")
    return {"layer_types": ["sliding_attention" if flag else "full_attention" for flag in pattern]}

  def _rope_scaling(self, theta: float, head_dim: int) -> dict[str, Any] | None:
    key = f"{self.arch}.rope.scaling"
    kind, factor = self._field(f"{key}.type", "none"), self._field(f"{key}.factor", 1)
    if kind == "linear" and _ROPE_FREQS not in self._tensors:
      if factor := self._number("rope.scaling.factor"):
        return {"rope_type": "linear", "factor": factor}
      raise self._error(f"{key}.type", f"lacks {key}.factor: fetch the file again")
    if kind != "none":
      raise self._error(f"{key}.type", "is not supported"
                        f"{f' beside {_ROPE_FREQS}' if kind == 'linear' else ''}: "
                        "load the model's Hugging Face folder instead")
    if factor not in (0, 1):
      raise self._error(f"{key}.factor", f"has no {key}.type that says how to scale: load the model's "
                        "Hugging Face folder instead")
    if _ROPE_FREQS not in self._tensors:
      return None
    # Llama 3.1 and later store the divisor of every frequency instead of the rule behind them.
    divisors = self._read(_ROPE_FREQS)
    scaling = {
        "rope_type": "llama3",
        "factor": float(divisors.max(initial=1.0)),
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    if divisors.shape != (head_dim // 2,) or not np.allclose(
        divisors, _llama3_divisors(scaling, theta, head_dim), rtol=1e-4):
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
    try:
      return gguf.dequantize(raw, tensor.tensor_type)
    except NotImplementedError as error:
      raise WeightError(f"{self._path} ({own_name}): the format {tensor.tensor_type.name} cannot be "
                        "read here: take a file of another quantisation") from error

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
