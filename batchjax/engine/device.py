"""What JAX says of a device."""

import math
from typing import Any

from absl import logging
import jax

from batchjax.plan.cost import CHIPS, Chip


def memory_limit(device: jax.Device, params: Any = None) -> int | None:
  """Bytes of a device for a job, its share of `params` (or their shapes) included; what else lies there is not.

  None where the device does not say, as on CPUs.
  """
  stats = device.memory_stats() or {}
  if "bytes_limit" not in stats:
    return None
  share = lambda x: x.sharding.shard_shape(x.shape) if getattr(x, "sharding", None) else x.shape
  ours = sum(math.prod(share(x)) * x.dtype.itemsize for x in jax.tree.leaves(params))
  return stats["bytes_limit"] - max(0, stats.get("bytes_in_use", 0) - ours)


def chip_of(device: jax.Device) -> Chip:
  """The roofline that weighs padding against compiling; the nearest one, and a warning, if unknown."""
  kind = device.device_kind.lower()
  names = {"a100": "a100", "h100": "h100", "h200": "h200", "l4": "l4", "t4": "t4",
           "v5 lite": "v5e", "v5e": "v5e", "v5": "v5p", "v6": "v6e", "7x": "tpu7x"}
  default = {"cpu": "cpu", "tpu": "v5e"}.get(device.platform, "a100")
  name = next((name for part, name in names.items() if part in kind), default)
  if not any(part in kind for part in names) and device.platform != "cpu":
    logging.warning("no roofline for %r: shapes are weighed by that of %s", device.device_kind, name)
  return CHIPS[name]
