"""Flags that name a workload, its sizes and its sampling, for the programs that run or compile one."""

import functools

from absl import flags

from batchjax.bench.workloads import default_sizes, never_drawn, WORKLOADS
from batchjax.config import ConfigError
from batchjax.types import SamplingParams

_DEFINE = {bool: flags.DEFINE_bool,
           int: functools.partial(flags.DEFINE_integer, lower_bound=1),
           float: functools.partial(flags.DEFINE_float, lower_bound=0.0)}
_SAMPLING = {
    "temperature": flags.DEFINE_float, "top_p": flags.DEFINE_float, "top_k": flags.DEFINE_integer,
    "presence_penalty": flags.DEFINE_float, "frequency_penalty": flags.DEFINE_float,
    "repetition_penalty": flags.DEFINE_float, "logprobs": flags.DEFINE_bool,
    "top_logprobs": flags.DEFINE_integer, "prompt_logprobs": flags.DEFINE_bool}


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


def define_sampling() -> None:
  """Defines a flag for each sampling parameter that costs time, and --stop_strings."""
  default = SamplingParams(temperature=0.0)
  for name, define_flag in _SAMPLING.items():
    define_flag(name, getattr(default, name), "Of all requests, as in SamplingParams.")
  flags.DEFINE_integer("stop_strings", 0, "So many stop strings a request, which never come.",
                       lower_bound=0)


def sampling_values() -> dict[str, int | float | bool]:
  """The flags of `define_sampling`, by name."""
  return {name: flags.FLAGS[name].value for name in (*_SAMPLING, "stop_strings")}


def sampling() -> SamplingParams:
  """What these flags say.

  Raises:
    ConfigError: they do not go together.
  """
  values = sampling_values()
  stop = never_drawn(values.pop("stop_strings"))
  try:
    return SamplingParams(**values, stop=stop)
  except ValueError as e:
    raise ConfigError(f"--{e}") from e
