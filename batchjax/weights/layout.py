"""Which part of each parameter a device of a mesh holds, and in what order."""

from collections.abc import Callable
import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
import numpy as np

from batchjax.config import ConfigError, MeshConfig, ModelConfig
from batchjax.models import init_params
from batchjax.sharding import device_index, spec_of, Split
from batchjax.weights.tree import flatten, in_first_layer, param_shapes


@dataclasses.dataclass(frozen=True)
class Layout:
  """Where a model's parameters lie.

  Every device holds the parameters of a smaller model (`ModelConfig.of_device`), so what is fused
  is so within each share: gate beside up, queries beside their key and value.

  Attributes:
    config: of the whole model.
    mesh: None leaves all of it on the default device.

  Raises:
    ConfigError: the model does not divide among the devices.
  """

  config: ModelConfig
  mesh: Mesh | None = None

  def __post_init__(self):
    self.config.of_device(self.num_devices)

  @property
  def num_devices(self) -> int:
    """That hold a share each."""
    return 1 if self.mesh is None else self.mesh.size

  @functools.cached_property
  def _axes(self) -> dict[str, PartitionSpec]:
    """Logical axis names of the parameters of one layer, and of those outside of layers."""
    one = dataclasses.replace(self.config, num_layers=1, layer_kinds=self.config.layer_kinds[:1])
    boxed = jax.eval_shape(lambda: init_params(one, jax.random.key(0)))
    return flatten({"params": nn.get_partition_spec(boxed)})

  @functools.cached_property
  def _share_shapes(self) -> dict[str, tuple[int, ...]]:
    return param_shapes(self.config.of_device(self.num_devices))

  def sharding(self, path: str) -> NamedSharding | None:
    """Of a parameter as it is stored; None without a mesh."""
    if self.mesh is None:
      return None
    return NamedSharding(self.mesh, spec_of(self._axes[in_first_layer(path)]))

  def shape(self, path: str) -> jax.ShapeDtypeStruct:
    """Shape, type and sharding of a parameter as it is stored."""
    share, sharding = self._share_shapes[path], self.sharding(path)
    if sharding is not None:
      share = tuple(size * (self.num_devices if axis else 1)
                    for size, axis in zip(share, sharding.spec))
    return jax.ShapeDtypeStruct(share, jnp.dtype(self.config.dtype), sharding=sharding)

  def put(self, path: str, parameter: np.ndarray) -> jax.Array:
    """A parameter of the whole model, on its devices; the host holds one share of it besides."""
    sharding = self.sharding(path)
    if sharding is None or sharding.is_fully_replicated:
      return jax.block_until_ready(jax.device_put(parameter, sharding))
    # One after the other, else the host would hold the shares of all.
    shares = [jax.block_until_ready(jax.device_put(self.share(path, parameter, i), device))
              for i, device in enumerate(self.mesh.devices.flat)]
    return jax.make_array_from_single_device_arrays(self.shape(path).shape, sharding, shares)

  def keep(self, path: str, make: Callable[..., jax.Array], *arguments: Any) -> jax.Array:
    """A parameter that every device makes, and of which each keeps its share.

    To be called within a jitted computation.

    Args:
      path: of the parameter.
      make: gives it as the whole model has it.
      *arguments: of `make`, the same on all devices.
    """
    if self.mesh is None:
      return make(*arguments)
    keep = lambda *arguments: self.share(path, make(*arguments), device_index())
    return jax.shard_map(keep, mesh=self.mesh, in_specs=(PartitionSpec(),) * len(arguments),
                         out_specs=self.sharding(path).spec, check_vma=False)(*arguments)

  def share(self, path: str, parameter: Any, device: Any) -> Any:
    """What a device holds of a parameter.

    Args:
      path: of the parameter.
      parameter: as the whole model has it, a numpy or a jax array.
      device: its index on the mesh, which for a jax array may be traced.
    """
    c, n, shape = self.config, self.num_devices, self._share_shapes[path]
    xp = jnp if isinstance(parameter, jax.Array) else np
    group = c.num_heads // c.num_kv_heads

    match path.split("/")[-1]:
      case "embedding" | "kernel":
        split = Split(n, c.vocab_size)
        ids = split.token_ids(np.arange(shape[0]), device)
        rows = xp.take(parameter, xp.minimum(ids, c.vocab_size - 1), axis=0)
        if shape[0] * n == c.vocab_size:
          return rows
        return xp.where((ids < c.vocab_size)[:, None], rows, rows.dtype.type(0))
      case "qkv" | "qkv_bias" if n <= c.num_kv_heads:
        width = c.num_kv_heads // n * (group + 2) * c.head_dim
        return parameter.reshape(-1, n, width)[:, device].reshape(shape)
      case "qkv" | "qkv_bias":
        heads = parameter.reshape(-1, c.num_kv_heads, group + 2, c.head_dim)
        queries = heads[:, :, :group].reshape(-1, n, c.num_heads // n, c.head_dim)[:, device]
        key_value = heads[:, :, group:][:, device // (n // c.num_kv_heads)]
        return xp.concatenate([queries, key_value], axis=1).reshape(shape)
      case "out":
        return parameter.reshape(n, *shape)[device]
      case "gate_up":
        both = _fill(parameter.reshape(-1, 2, c.ffn_size), 2, n)
        return both.reshape(-1, 2, n, shape[1] // 2)[:, :, device].reshape(shape)
      case "down":
        return _fill(parameter, 0, n).reshape(n, *shape)[device]
    return parameter


def _fill(x: Any, axis: int, multiple: int) -> Any:
  """Zeros behind the end of an axis, up to a multiple."""
  missing = -x.shape[axis] % multiple
  if not missing:
    return x
  xp = jnp if isinstance(x, jax.Array) else np
  return xp.pad(x, [(0, missing * (i == axis)) for i in range(x.ndim)])


def check_placed(params: Any, mesh: MeshConfig, remedy: str = "load it with that mesh") -> None:
  """Raises ConfigError where parameters, or their shapes, are of another number of devices than `mesh`."""
  count = lambda x: len(x.sharding.device_set) if getattr(x, "sharding", None) else 1
  found = max(map(count, jax.tree.leaves(params)), default=mesh.tensor)
  if found != mesh.tensor:
    raise ConfigError(
        f"the model is laid out for engine.mesh.tensor={found}, not {mesh.tensor}: {remedy}")
