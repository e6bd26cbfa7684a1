"""Orbax checkpoints: a folder with `params/` and the model's configuration."""

import dataclasses
import json
import math
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from batchjax.config import ConfigError, MeshConfig, ModelConfig, from_config_dict
from batchjax.model_files import damaged, read_object
from batchjax.weights.stored import WeightError
from batchjax.weights.layout import check_placed, Layout
from batchjax.weights.tree import flatten, in_first_layer, nest, param_shapes

CONFIG = "model_config.json"
_PARAMS = "params"


def read_config(folder: pathlib.Path) -> ModelConfig:
  """The configuration that `save` wrote; ConfigError where the file is damaged."""
  values = read_object(folder / CONFIG)
  try:
    return from_config_dict(ModelConfig, values, CONFIG)
  except ConfigError as error:
    raise ConfigError(f"{folder}: {error}") from error


def save(folder: pathlib.Path, config: ModelConfig, params: dict[str, Any]) -> None:
  """Writes the configuration and the parameters; refuses to overwrite parameters.

  Raises:
    ConfigError: the parameters lie on several devices.
  """
  check_placed(params, MeshConfig(), "to save it, load it on one device")
  folder.mkdir(parents=True, exist_ok=True)
  with ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(folder.resolve() / _PARAMS, params)
  (folder / CONFIG).write_text(json.dumps(dataclasses.asdict(config), indent=2) + "\n")


def restore(folder: pathlib.Path, config: ModelConfig,
            mesh: jax.sharding.Mesh | None = None) -> dict[str, Any]:
  """The parameters, restored straight to their devices in `config.dtype`.

  On a mesh the devices share out the reading; what each needs of the others comes from them.

  Host memory holds at most `max_read_gb` besides what the devices hold.

  Raises:
    ConfigError: the checkpoint is damaged, or does not divide among the devices.
    WeightError: a parameter is missing, superfluous or of the wrong shape.
  """
  path, layout = folder.resolve() / _PARAMS, Layout(config, mesh)
  try:
    return _restore(path, layout)
  except (WeightError, jax.errors.JaxRuntimeError):
    raise
  except Exception as error:  # Orbax lets through what its storage raises, of any type
    raise damaged(path, error) from error


def _restore(path: pathlib.Path, layout: Layout) -> dict[str, Any]:
  config, mesh = layout.config, layout.mesh
  with ocp.StandardCheckpointer(restore_concurrent_gb=max_read_gb(config)) as checkpointer:
    stored = flatten(checkpointer.metadata(path).item_metadata.tree)
    expected = param_shapes(config)
    for name, shape in expected.items():
      if name not in stored:
        raise WeightError(f"{path}: lacks the parameter {name}, expected shape {shape}")
      if tuple(stored[name].shape) != shape:
        raise WeightError(f"{path}: {name} has shape {tuple(stored[name].shape)}, "
                          f"expected {shape}")
    if superfluous := sorted(set(stored) - set(expected)):
      raise WeightError(f"{path}: {superfluous} are not parameters of this {config.family} model")
    target = nest({
        name: jax.ShapeDtypeStruct(shape, jnp.dtype(config.dtype),
                                   sharding=_read_sharding(shape, mesh))
        for name, shape in expected.items()})
    params = checkpointer.restore(path, target)
  if mesh is None:
    return params
  by_path = flatten(params)
  del params
  for name in by_path:  # one after the other: only one is held twice
    keep = jax.jit(_keep, static_argnums=(0, 1), out_shardings=layout.sharding(name))
    by_path[name] = jax.block_until_ready(keep(layout, in_first_layer(name), by_path[name]))
  return nest(by_path)


def _keep(layout: Layout, path: str, parameter: jax.Array) -> jax.Array:
  return layout.keep(path, lambda x: x, parameter)


def _read_sharding(shape: tuple[int, ...], mesh: jax.sharding.Mesh | None) -> jax.sharding.Sharding:
  """How a parameter is first read: equal parts of the longest axis that divides, else all of it."""
  if mesh is None:
    return jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  axis = max(range(len(shape)), key=lambda i: shape[i] * (shape[i] % mesh.size == 0))
  names = [None] * len(shape)
  if shape[axis] % mesh.size == 0:
    names[axis] = mesh.axis_names[0]
  return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*names))


def max_read_gb(config: ModelConfig) -> int:
  """GB read ahead of the devices: the library needs room for the largest parameter as stored."""
  largest = max(math.prod(shape) for shape in param_shapes(config).values())
  return 1 + 4 * largest // 10**9
