"""The parameter tree of the transformer, by path; every loader fills this one."""

from collections.abc import Mapping
import re
from typing import Any

import jax

from batchjax.config import ModelConfig

def param_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
  """Path, "/" between modules, and shape of every parameter, in the order of a forward pass."""
  d, f, h = config.hidden_size, config.ffn_size, config.head_dim
  k, g = config.num_kv_heads, config.num_heads // config.num_kv_heads
  layer = {"attn_norm/scale": (d,), "attn/qkv": (d, k * (g + 2) * h)}
  if config.qkv_bias:
    layer["attn/qkv_bias"] = (k, g + 2, h)
  if config.qk_norm:
    layer |= {"attn/q_norm/scale": (h,), "attn/k_norm/scale": (h,)}
  layer["attn/out"] = (k, g, h, d)
  if config.post_norms:
    layer["post_attn_norm/scale"] = (d,)
  layer |= {"ffn_norm/scale": (d,), "ffn/gate_up": (d, 2 * f), "ffn/down": (f, d)}
  if config.post_norms:
    layer["post_ffn_norm/scale"] = (d,)

  shapes = {"embed/embedding": (config.vocab_size, d)}
  for i in range(config.num_layers):
    shapes |= {f"layers_{i}/{path}": shape for path, shape in layer.items()}
  shapes["final_norm/scale"] = (d,)
  if not config.tie_embeddings:
    shapes["lm_head/kernel"] = (config.vocab_size, d)
  return shapes


def in_first_layer(path: str) -> str:
  """The path of the same parameter in the first layer, or of one that lies in no layer."""
  return re.sub(r"^layers_\d+/", "layers_0/", path)


def nest(by_path: Mapping[str, Any]) -> dict[str, Any]:
  """Values by path as the nested dict under "params" that `module.apply` takes."""
  tree: dict[str, Any] = {}
  for path, value in by_path.items():
    *modules, leaf = path.split("/")
    node = tree
    for module in modules:
      node = node.setdefault(module, {})
    node[leaf] = value
  return {"params": tree}


def flatten(params: Mapping[str, Any]) -> dict[str, Any]:
  """The inverse of `nest`."""
  leaves, _ = jax.tree_util.tree_flatten_with_path(params["params"])
  return {"/".join(key.key for key in keys): leaf for keys, leaf in leaves}


def shapes_of(tree: Any) -> Any:
  """A tree with shapes and types in place of its arrays, and how a mesh splits them."""
  def shape(x):
    sharding = getattr(x, "sharding", None)
    is_split = sharding is not None and len(sharding.device_set) > 1
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding if is_split else None)
  return jax.tree.map(shape, tree)
