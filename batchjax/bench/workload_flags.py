"""Flags that name a workload and its sizes, for the programs that run or compile one."""

import functools

from absl import flags

from batchjax.bench.workloads import default_sizes, WORKLOADS
from batchjax.config import ConfigError

_DEFINE = {bool: flags.DEFINE_bool,
           int: functools.partial(flags.DEFINE_integer, lower_bound=1),
           float: functools.partial(flags.DEFINE_float, lower_bound=0.0)}


def define() -> flags.FlagHolder:
  """Defines --workload, which it returns, and a flag for each size of any workload."""
  kinds = {size: type(default) for name in WORKLOADS
           for size, default in default_sizes(name).items()}
  for size, kind in kinds.items():
    _DEFINE[kind](size, None, "Of " + ", ".join(
        f"{name} ({default_sizes(name)[size]})" for name in WORKLOADS
        if size in default_sizes(name)))
  return flags.DEFINE_enum("workload", None, sorted(WORKLOADS), "What to run.", required=True)


def sizes_of(workload: str) -> dict[str, int | float | bool]:
  """The sizes of a workload: its own, save for those that flags give.

  Raises:
    ConfigError: a flag names a size that the workload does not have.
  """
  sizes = default_sizes(workload)
  given = {size: flags.FLAGS[size].value for name in WORKLOADS for size in default_sizes(name)
           if flags.FLAGS[size].value is not None}
  if unknown := sorted(set(given) - set(sizes)):
    raise ConfigError(f"--workload={workload} has no {', '.join(unknown)}; "
                      f"it has {', '.join(sizes)}")
  return sizes | given
