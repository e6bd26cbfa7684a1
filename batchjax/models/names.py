"""Where each Hugging Face tensor goes in the parameter tree."""

import dataclasses
from collections.abc import Mapping

import numpy as np

from batchjax.config import ModelConfig

ALL = slice(None)


@dataclasses.dataclass(frozen=True)
class Target:
  """The part of a parameter that one Hugging Face tensor fills.

  A loader allocates the parameter and, tensor by tensor, assigns
  `target.part_of(parameter)[...] = target.arrange(tensor)`.

  Attributes:
    path: of the parameter in the tree.
    shape: the tensor is reshaped to this first (its own shape says the rest),
    axes: then transposed by this.
    index: what it then fills; () is the whole parameter,
    view: seen in this shape; () is its own.
  """

  path: tuple[str, ...]
  shape: tuple[int, ...]
  axes: tuple[int, ...]
  index: tuple[int | slice, ...] = ()
  view: tuple[int, ...] = ()

  def arrange(self, tensor: np.ndarray) -> np.ndarray:
    """The tensor as `part_of` holds it; a view where numpy can."""
    return tensor.reshape(self.shape).transpose(self.axes)

  def part_of(self, parameter: np.ndarray) -> np.ndarray:
    """What the tensor fills of a parameter: a view."""
    return parameter.reshape(self.view or parameter.shape)[self.index]


def decoder_map(config: ModelConfig, ffn_norm: str = "post_attention_layernorm",
                post_norms: Mapping[str, str] | None = None) -> dict[str, Target]:
  """The map of a decoder-only model with the tensor names that Llama began.

  Args:
    config: the model's.
    ffn_norm: Hugging Face name of the norm before the feed-forward.
    post_norms: parameter name to Hugging Face name of the norms after
      attention and feed-forward, where the family has them.
  """
  c = config
  group = c.num_heads // c.num_kv_heads
  heads = (c.num_kv_heads, group, c.head_dim)
  kv_heads = (c.num_kv_heads, c.head_dim)

  def whole(shape, *path):
    return Target(path, shape, tuple(range(len(shape))))

  def transposed(shape, index, *path):
    return Target(path, shape, (1, 0), index)

  def qkv_weight(shape, index, *path):
    """[heads * H, D] becomes [D, heads, H] of a [D, K, G + 2, H] that is stored as a matrix."""
    return Target(path, (*shape, c.hidden_size), (len(shape), *range(len(shape))), (ALL, *index),
                  (c.hidden_size, c.num_kv_heads, group + 2, c.head_dim))

  def qkv_bias(shape, index, *path):
    return Target(path, shape, tuple(range(len(shape))), index)

  parts = {"q": (heads, (ALL, slice(0, group))), "k": (kv_heads, (ALL, group)),
           "v": (kv_heads, (ALL, group + 1))}
  norms = {"attn_norm": "input_layernorm", "ffn_norm": ffn_norm, **(post_norms or {})}

  names = {"model.embed_tokens.weight": whole((c.vocab_size, c.hidden_size), "embed", "embedding"),
           "model.norm.weight": whole((c.hidden_size,), "final_norm", "scale")}
  if not c.tie_embeddings:
    names["lm_head.weight"] = whole((c.vocab_size, c.hidden_size), "lm_head", "kernel")
  for i in range(c.num_layers):
    theirs, ours = f"model.layers.{i}.", f"layers_{i}"
    for name, hf_name in norms.items():
      names[f"{theirs}{hf_name}.weight"] = whole((c.hidden_size,), ours, name, "scale")
    for part, (shape, index) in parts.items():
      prefix = f"{theirs}self_attn.{part}_proj."
      names[prefix + "weight"] = qkv_weight(shape, index, ours, "attn", "qkv")
      if c.qkv_bias:
        names[prefix + "bias"] = qkv_bias(shape, index, ours, "attn", "qkv_bias")
    if c.qk_norm:
      for name in ("q_norm", "k_norm"):
        names[f"{theirs}self_attn.{name}.weight"] = whole(
            (c.head_dim,), ours, "attn", name, "scale")
    names[f"{theirs}self_attn.o_proj.weight"] = Target(
        (ours, "attn", "out"), (c.hidden_size, *heads), (1, 2, 3, 0))
    matrix = (c.ffn_size, c.hidden_size)
    for j, name in enumerate(("gate_proj", "up_proj")):
      columns = slice(j * c.ffn_size, (j + 1) * c.ffn_size)
      names[f"{theirs}mlp.{name}.weight"] = transposed(
          matrix, (ALL, columns), ours, "ffn", "gate_up")
    names[f"{theirs}mlp.down_proj.weight"] = transposed(matrix[::-1], (), ours, "ffn", "down")
  return names
