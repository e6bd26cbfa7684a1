"""Orbax checkpoints: a folder with `params/` and the model's configuration."""

import dataclasses
import json
import math
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from batchjax.config import ConfigError, ModelConfig, from_config_dict
from batchjax.model_files import damaged, read_object
from batchjax.weights.stored import WeightError
from batchjax.weights.tree import ShardingFn, default_device, flatten, nest, param_shapes

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
  """Writes the configuration and the parameters; refuses to overwrite parameters."""
  folder.mkdir(parents=True, exist_ok=True)
  with ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(folder.resolve() / _PARAMS, params)
  (folder / CONFIG).write_text(json.dumps(dataclasses.asdict(config), indent=2) + "\n")


def restore(folder: pathlib.Path, config: ModelConfig,
            sharding_fn: ShardingFn = default_device) -> dict[str, Any]:
  """The parameters, restored straight to their devices in `config.dtype`.

  Host memory holds at most `max_read_gb` besides what the devices hold.

  Raises:
    ConfigError: the checkpoint is damaged.
    WeightError: a parameter is missing, superfluous or of the wrong shape.
  """
  path = folder.resolve() / _PARAMS
  try:
    return _restore(path, config, sharding_fn)
  except (WeightError, jax.errors.JaxRuntimeError):
    raise
  except Exception as error:  # Orbax lets through what its storage raises, of any type
    raise damaged(path, error) from error


def _restore(path: pathlib.Path, config: ModelConfig, sharding_fn: ShardingFn) -> dict[str, Any]:
  default = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
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
                                   sharding=sharding_fn(name) or default)
        for name, shape in expected.items()})
    return checkpointer.restore(path, target)


def max_read_gb(config: ModelConfig) -> int:
  """GB read ahead of the devices: the library needs room for the largest parameter as stored."""
  largest = max(math.prod(shape) for shape in param_shapes(config).values())
  return 1 + 4 * largest // 10**9
