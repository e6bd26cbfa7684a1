"""One model on several devices: the mesh, who holds what, and what their programs exchange.

Every device runs the same program, that of a smaller model (`ModelConfig.of_device`), under
`jax.shard_map`; what one needs of the others goes through `Split`. On one device there is no mesh,
and each method of `Split` is the identity.
"""

from collections.abc import Callable, Iterable, Sequence
import dataclasses
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array
import numpy as np

from batchjax.config import ConfigError, MeshConfig, ModelConfig, VOCAB_SEGMENTS

_AXIS = "tensor"
# Logical axes of parameters and state that are split; others are whole on every device.
_SPLIT_AXES = ("vocab", "kv_heads", "ffn")


def resolve(config: MeshConfig) -> MeshConfig:
  """The mesh with its number of devices written out.

  Raises:
    ConfigError: there are fewer devices.
  """
  found = jax.local_device_count()
  if config.tensor > found:
    raise ConfigError(
        f"engine.mesh.tensor={config.tensor} needs as many devices, JAX finds {found} "
        f"({jax.local_devices()[0].device_kind}): lower it, or set 0 for all of them")
  return MeshConfig(config.tensor or found)


def make_mesh(config: MeshConfig) -> Mesh | None:
  """The first devices of this machine, as many as `config` says; None for one.

  Raises:
    ConfigError: there are fewer.
  """
  size = resolve(config).tensor
  return None if size == 1 else Mesh(np.array(jax.local_devices()[:size]), (_AXIS,))


def devices_of(mesh: Mesh | None) -> list[jax.Device]:
  """Those of the mesh, or the one where computations run without one."""
  return [jax.devices()[0]] if mesh is None else list(mesh.devices.flat)


def spec_of(axes: Iterable[str | None]) -> PartitionSpec:
  """How an array with these logical axes is split."""
  return PartitionSpec(*(_AXIS if name in _SPLIT_AXES else None for name in axes))


def specs_of(tree: Any, mesh: Mesh | None) -> Any:
  """How the arrays of a tree, or what stands for them, lie on the mesh; all whole without one."""
  return jax.tree.map(lambda x: PartitionSpec() if mesh is None else x.sharding.spec, tree)


def replicated(mesh: Mesh | None) -> NamedSharding | None:
  """The sharding of what every device holds whole; None without a mesh."""
  return None if mesh is None else NamedSharding(mesh, PartitionSpec())


def device_index() -> jax.Array:
  """Which device of the mesh runs this program."""
  return lax.axis_index(_AXIS)


def jit(function: Callable[..., Any], mesh: Mesh | None, in_specs: Sequence[Any], out_specs: Any,
        donate_argnums: int) -> Any:
  """`jax.jit` of what every device does with its shares.

  Args:
    function: of shares, to shares.
    mesh: None is one device, where shares are the whole.
    in_specs: of each argument, a tree of `PartitionSpec` or one for all of it.
    out_specs: likewise, of the result.
    donate_argnums: as of `jax.jit`.
  """
  if mesh is None:
    return jax.jit(function, donate_argnums=donate_argnums)
  place = lambda specs: jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)
  return jax.jit(
      jax.shard_map(function, mesh=mesh, in_specs=tuple(in_specs), out_specs=out_specs,
                    check_vma=False),
      in_shardings=place(tuple(in_specs)), out_shardings=place(out_specs),
      donate_argnums=donate_argnums)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Split:
  """What the program of a device knows of the others, and how they exchange.

  A device holds the vocabulary in the order of its own *places*: a place is what an index into its
  logits means. Places are in the order of the token ids that they stand for.

  Attributes:
    num_devices: that share the model; the methods below are the identity for one.
    vocab_size: of the whole vocabulary; without meaning for one device.
  """

  num_devices: int = 1
  vocab_size: int = 0

  @classmethod
  def of(cls, mesh: MeshConfig, model: ModelConfig) -> "Split":
    """That of a whole model on a mesh."""
    return cls() if mesh.tensor == 1 else cls(mesh.tensor, model.vocab_size)

  @property
  def num_segments(self) -> int:
    """Segments of the vocabulary that a device holds (see `VOCAB_SEGMENTS`)."""
    return -(-VOCAB_SEGMENTS // self.num_devices)

  def sum(self, x: Array) -> Array:
    """The sum over all devices."""
    return x if self.num_devices == 1 else lax.psum(x, _AXIS)

  def max(self, x: Array) -> Array:
    """The largest of all devices."""
    return x if self.num_devices == 1 else lax.pmax(x, _AXIS)

  def first_token(self, places: Array, num_places: int) -> Array:
    """The lowest of the tokens at a place of each device; `num_places` is no token."""
    if self.num_devices == 1:
      return places
    ids = jnp.where(places < num_places, self.token_ids(places), jnp.iinfo(jnp.int32).max)
    return lax.pmin(ids, _AXIS)

  def of_owner(self, x: Array, is_here: Array) -> Array:
    """The values of the one device where each `is_here`."""
    return x if self.num_devices == 1 else lax.psum(jnp.where(is_here, x, 0), _AXIS)

  def gather(self, x: Array) -> Array:
    """[R, n] of each device side by side, on every device."""
    return x if self.num_devices == 1 else lax.all_gather(x, _AXIS, axis=1, tiled=True)

  def token_ids(self, places: Any, device: Any = None) -> Any:
    """The tokens of a device's places; `vocab_size` or more where a place is padding.

    Args:
      places: i32[n].
      device: its index on the mesh; None is the one whose program asks.
    """
    if self.num_devices == 1:
      return places
    device = device_index() if device is None else device
    segment = device * self.num_segments + places % self.num_segments
    ids = places // self.num_segments * VOCAB_SEGMENTS + segment
    return ids + self.vocab_size * (segment >= VOCAB_SEGMENTS)

  def places(self, token_ids: Array) -> Array:
    """Where this device holds tokens; past its last place where it does not, and for -1."""
    if self.num_devices == 1:
      return token_ids
    segment = self.own_segments(token_ids % VOCAB_SEGMENTS)
    is_here = (token_ids >= 0) & (segment < self.num_segments)
    return jnp.where(is_here, token_ids // VOCAB_SEGMENTS * self.num_segments + segment,
                     self.num_segments * -(-self.vocab_size // VOCAB_SEGMENTS))

  def own_segments(self, segments: Array) -> Array:
    """Segments as this device counts them; `num_segments` for those that others hold."""
    if self.num_devices == 1:
      return segments
    own = segments - device_index() * self.num_segments
    return jnp.where((own >= 0) & (own < self.num_segments), own, self.num_segments)

  def mask_padding(self, logits: Array) -> Array:
    """Logits f32[..., places of this device], -inf where a place is padding."""
    size = logits.shape[-1]
    if size * self.num_devices == (self.vocab_size or size):
      return logits
    ids = self.token_ids(jnp.arange(size, dtype=jnp.int32))
    return jnp.where(ids < self.vocab_size, logits, -jnp.inf)
