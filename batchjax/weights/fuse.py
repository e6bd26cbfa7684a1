"""Hugging Face tensors to the model's fused parameters, and back."""

import collections
import math
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from batchjax.config import MeshConfig, ModelConfig
from batchjax.models.names import Target
from batchjax.weights.stored import StoredTensors, WeightError
from batchjax.weights.layout import check_placed, Layout
from batchjax.weights.tree import flatten, nest, param_shapes

# Buffers that old checkpoints carry and that are computed from the configuration.
_IGNORED_SUFFIXES = (".rotary_emb.inv_freq",)
_OUTPUT = "lm_head.weight"
# A transposing copy goes by strips of this many columns, whose cache lines stay in reach:
# 2 GB/s on one core where the whole array at once goes at 0.3.
_STRIP = 16


def fuse(config: ModelConfig, targets: Mapping[str, Target], tensors: StoredTensors,
         mesh: jax.sharding.Mesh | None = None) -> dict[str, Any]:
  """Reads tensor by tensor; each parameter goes to its devices as soon as it is complete.

  Host memory holds one parameter and one device's share of it, besides what the devices hold.

  Raises:
    WeightError: a tensor is missing, superfluous, of the wrong shape, or does
      not fit the range of `config.dtype`.
  """
  _check_names(config, targets, tensors)
  names_of = collections.defaultdict(list)
  for name, target in targets.items():
    names_of["/".join(target.path)].append(name)
  params, layout = {}, Layout(config, mesh)
  for path, shape in param_shapes(config).items():
    buffer = np.empty(shape, jnp.dtype(config.dtype))
    for name in names_of[path]:
      _fill(buffer, targets[name], tensors, name)
    params[path] = layout.put(path, buffer)  # waits, else transfers would pile up their buffers
  return nest(params)


def unfuse(targets: Mapping[str, Target], params: Mapping[str, Any],
           ) -> Iterator[tuple[str, np.ndarray]]:
  """The inverse of `fuse` on one device: names and tensors, fetched from it one at a time.

  Raises:
    ConfigError: the parameters lie on several.
  """
  check_placed(params, MeshConfig(), "to save it, load it on one device")
  by_path = flatten(params)
  path, buffer = "", None
  for name, target in sorted(targets.items(), key=lambda item: item[1].path):
    if "/".join(target.path) != path:
      path = "/".join(target.path)
      buffer = jax.device_get(by_path[path])
    part = target.part_of(buffer)
    yield name, np.ascontiguousarray(
        part.transpose(np.argsort(target.axes)).reshape(stored_shape(name, target)))


def stored_shape(name: str, target: Target) -> tuple[int, ...]:
  """Shape of the Hugging Face tensor: biases and norms are vectors, the others matrices."""
  shape = target.shape
  if len(shape) == 1 or name.endswith(".bias"):
    return (math.prod(shape),)
  # The model width is one of the two dimensions; all others make up the other one.
  split = 1 if target.axes[-1] == 0 else len(shape) - 1
  return math.prod(shape[:split]), math.prod(shape[split:])


def _check_names(config: ModelConfig, targets: Mapping[str, Target],
                 tensors: StoredTensors) -> None:
  for name, target in targets.items():
    expected, where = stored_shape(name, target), tensors.locate(name)
    if name not in tensors.shapes:
      raise WeightError(f"{where}: lacks the tensor {name}, expected shape {expected}: fetch the model "
                        "again; does config.json belong to it?")
    if tensors.shapes[name] != expected:
      raise WeightError(f"{where}: {name} has shape {tensors.shapes[name]}, expected {expected}; does "
                        "config.json belong to it?")
  for name in sorted(set(tensors.shapes) - set(targets)):
    is_tied_copy = name == _OUTPUT and config.tie_embeddings
    if not is_tied_copy and not name.endswith(_IGNORED_SUFFIXES):
      raise WeightError(f"{tensors.locate(name)}: {name}, of shape {tensors.shapes[name]}, is no "
                        f"tensor of this {config.family} model; does config.json belong to it?")


@np.errstate(over="ignore", invalid="ignore")  # an error below, or NaN that stays NaN
def _fill(buffer: np.ndarray, target: Target, tensors: StoredTensors, name: str) -> None:
  part = target.part_of(buffer)
  source = target.arrange(tensors.read(name))
  is_transposed = target.axes != tuple(range(source.ndim))
  width = _STRIP if is_transposed else source.shape[-1]
  for start in range(0, source.shape[-1], width):
    part[..., start:start + width] = source[..., start:start + width]
  if buffer.dtype == np.float16 and not np.isfinite(part).all():
    raise WeightError(f"{tensors.locate(name)}: {name} exceeds the range of float16; "
                      "load it as bfloat16 or float32")
