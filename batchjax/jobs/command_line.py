"""What the mains of all scripts share: flags, configuration, one line for an error, exit codes."""

from collections.abc import Callable, Sequence
import dataclasses
import difflib
import errno
import logging
import os
import re
import signal
import sys
import traceback
import typing
from typing import Any, NoReturn

from absl import app
from absl import flags
import ml_collections

from batchjax.config import ConfigError, from_config_dict, JobConfig
from batchjax.io.files import DamagedFile
from batchjax.io.journal import JournalError
from batchjax.io.records import InputError
from batchjax.jobs.folder import JobError
from batchjax.jobs.prepare import BadRow
from batchjax.report import MetricsError, terminal
from batchjax.weights import WeightError

ERROR_ROWS, REFUSED, INTERRUPTED = 3, 2, 130

ERRORS = (ConfigError, InputError, JobError, JournalError, DamagedFile, BadRow, WeightError,
          MetricsError, OSError, MemoryError)
_REMEDIES = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), "make room and run the same command again"),
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS),
                    "give yourself access, or name another path"),
    **dict.fromkeys((errno.ENOENT, errno.EISDIR, errno.ENOTDIR, errno.ENAMETOOLONG, errno.EEXIST),
                    "check the path")}


def launch(main: Callable[[], int | None], errors: tuple[type[Exception], ...] = ()) -> NoReturn:
  """Runs a script: parses its flags, calls `main`, and exits with its code.

  An error that a user can mend is one line on standard error and code 2; any
  other is a fault of batchjax, a traceback and code 1.

  Args:
    main: returns the exit code; None is 0.
    errors: of the script, beside those of jobs.
  """
  terminal.guard_streams()
  for name in ("httpx", "httpx2", "botocore", "aiobotocore"):  # which log every request
    logging.getLogger(name).setLevel(logging.WARNING)
  signal.signal(signal.SIGINT, signal.default_int_handler)
  app.run(lambda _: _guarded(main, errors), flags_parser=lambda argv: _guarded(
      lambda: _parse(argv), (), sys.exit))


def job_config(config: ml_collections.ConfigDict, **changes: object) -> JobConfig:
  """The job that `--config` and its overrides describe, with some fields changed.

  Raises:
    ConfigError: a field is unknown, of the wrong type or out of range.
  """
  if not isinstance(config, ml_collections.ConfigDict):
    raise ConfigError("get_config() of the configuration file returns "
                      f"{type(config).__name__}: return to_config_dict(JobConfig(...))")
  return from_config_dict(JobConfig, config.to_dict() | changes)


def _guarded(main: Callable[[], object], errors: tuple[type[Exception], ...],
             exit_fn: Callable[[int], object] = lambda code: code) -> object:
  try:
    result = main()
    sys.stdout.flush()
    return result
  except KeyboardInterrupt as stopped:
    print(f"\n{str(stopped) or 'stopped'}", file=sys.stderr)
    return exit_fn(INTERRUPTED)
  except (*ERRORS, *errors) as error:
    print(f"error: {terminal.printable(_describe(error))}", file=sys.stderr)
    return exit_fn(REFUSED)


def _describe(error: Exception) -> str:
  if isinstance(error, MemoryError):
    return f"{error}: the memory is not enough: lower engine.plan_window, or split the input".lstrip(": ")
  if not isinstance(error, OSError) or not error.strerror:
    return str(error)
  where = f"{error.filename}: " if error.filename is not None else ""
  remedy = _REMEDIES.get(error.errno)
  return f"{where}{error.strerror}{f': {remedy}' if remedy else ''}"


def _parse(argv: Sequence[str]) -> list[str]:
  """What is left of the command line once the flags are taken; raises ConfigError."""
  _check_overrides(argv)
  try:
    left = flags.FLAGS(argv)
    if "config" in flags.FLAGS:
      getattr(flags.FLAGS["config"].value, "lock", None)  # raises where the file could not be read
  except SystemExit as e:
    is_help = any(arg.lstrip("-").startswith(("help", "?")) for arg in argv[1:])
    raise SystemExit(0 if is_help else e.code) from None  # absl has 1 for --help
  except Exception as error:  # whatever a configuration file raises
    raise ConfigError(_explain(error, _config_path(argv))) from error
  if len(left) > 1:
    raise ConfigError(f"unexpected arguments {left[1:]}: flags begin with --; see --help")
  return left


def _config_path(argv: Sequence[str]) -> str:
  """The value of --config on the command line, "" where there is none."""
  for arg, after in zip(argv[1:], [*argv[2:], ""]):
    name, has_value, value = arg.lstrip("-").partition("=")
    if arg.startswith("-") and name == "config":
      return value if has_value else after
  return ""


def _check_overrides(argv: Sequence[str]) -> None:
  """Raises ConfigError for `--config.<name>` where a job has no such field."""
  known = _fields(JobConfig)
  for arg in argv[1:]:
    flag = re.match(r"--?(?:no)?config\.([^=]+)", arg)
    if not flag or flag[1] in known:
      continue
    near = [f"--config.{field}" for field in difflib.get_close_matches(flag[1], known, n=3)
            or [field for field in known if field.startswith(f"{flag[1]}.")][:3]]
    hint = f"did you mean {' or '.join(near)}?" if near else "see JobConfig in batchjax/config.py"
    raise ConfigError(f"{flag[0]} is no field of the configuration: {hint}")


def _fields(cls: type, prefix: str = "") -> dict[str, Any]:
  """The type of each field by its dotted name, those of dataclasses inside too."""
  fields = {}
  for name, hint in typing.get_type_hints(cls).items():
    fields |= (_fields(hint, f"{prefix}{name}.") if dataclasses.is_dataclass(hint)
               else {prefix + name: hint})
  return fields


def _explain(error: Exception, path: str) -> str:
  """One sentence on why flags or the configuration file cannot be used."""
  # Libraries wrap what a configuration file raises, in texts that hold its traceback.
  while (inner := error.__cause__ or error.__context__) and any(text in str(error) for text in (
      "Error whilst parsing config file", "Configuration is not available")):
    error = inner
  if isinstance(error, flags.Error):
    name = re.match(r"flag --config\.([\w.]+)=", str(error))
    kind = _fields(JobConfig).get(name[1]) if name else None
    return f"{error}; " + (f"it takes {getattr(kind, '__name__', kind)}" if kind else "see --help")
  lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__)
           if os.path.abspath(frame.filename) == os.path.abspath(path.split(":")[0])]
  if not lines and isinstance(error, OSError):
    return f"--config={path} cannot be read: check the path"
  where = f"--config={path}{f', line {lines[-1]}' if lines else ''}"
  if isinstance(error, (ConfigError, ImportError)):
    return f"{where}: {error}{': install it' if str(error).startswith('No module') else ''}"
  return f"{where}: {type(error).__name__}: {error}: mend the file"
