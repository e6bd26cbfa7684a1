"""Configurations and example inputs that come with batchjax, by name."""

from collections.abc import Sequence
import os
import pathlib

from batchjax.config import ConfigError

_CONFIGS = pathlib.Path(__file__).parents[1] / "configs"


def configs() -> list[str]:
  """Names of the configurations."""
  return sorted(path.stem for path in _CONFIGS.glob("*.py"))


def examples() -> list[str]:
  """Names of the example inputs."""
  return sorted(path.name.split(".")[0] for path in (_CONFIGS / "examples").glob("*.jsonl"))


def input_path(value: str) -> str:
  """The value of --input as a path: what has neither a / nor a . and is no file is a name.

  Raises:
    ConfigError: no example has the name.
  """
  if not _is_name(value):
    return value
  return str(_CONFIGS / "examples" / f"{_one_of(examples(), 'input', value, 'an example')}.jsonl")


def config_path(argv: Sequence[str]) -> str:
  """The value of --config on the command line, "" where there is none."""
  return "".join(argv[i][start:] for i, start in _config_values(argv)[:1])


def with_config_path(argv: Sequence[str]) -> list[str]:
  """The command line with a path in the place of a name after --config.

  What has neither a / nor a . and is no file is a name; what follows a : goes to `get_config`.

  Raises:
    ConfigError: no configuration has the name.
  """
  result = list(argv)
  for i, start in _config_values(argv):
    name, colon, argument = argv[i][start:].partition(":")
    if _is_name(name):
      name = _one_of(configs(), "config", name, "a configuration")
      result[i] = f"{argv[i][:start]}{_CONFIGS / name}.py{colon}{argument}"
  return result


def _is_name(value: str) -> bool:
  return bool(value) and not {os.sep, "."} & set(value) and not os.path.exists(value)


def _one_of(names: Sequence[str], flag: str, name: str, kind: str) -> str:
  if name not in names:
    raise ConfigError(f"--{flag}={name} is neither a file nor the name of {kind} that comes with "
                      f"batchjax: those are {', '.join(names)}")
  return name


def _config_values(argv: Sequence[str]) -> list[tuple[int, int]]:
  """Where the values of --config stand: which argument, and from which character on."""
  found = []
  for i, arg in enumerate(argv[1:], start=1):
    name, has_value, _ = arg.lstrip("-").partition("=")
    if arg.startswith("-") and name == "config" and (has_value or i + 1 < len(argv)):
      found.append((i, arg.index("=") + 1) if has_value else (i + 1, 0))
  return found
