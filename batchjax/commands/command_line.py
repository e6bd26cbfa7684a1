"""What all commands share: flags, configuration, one line for an error, exit codes."""

from collections.abc import Callable, Sequence
import difflib
import errno
import logging
import os
import re
import signal
import sys
import traceback
import types
from typing import NoReturn

from absl import app
from absl import flags
import ml_collections
from ml_collections import config_flags

from batchjax.commands import help_text, packaged
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


def launch(command: types.ModuleType) -> NoReturn:
  """Runs a command: parses its flags out of `sys.argv`, calls its `main`, and exits with its code.

  An error that a user can mend is one line on standard error and code 2; any
  other is a fault of batchjax, a traceback and code 1.

  Args:
    command: a module with a docstring, `define_flags()`, `main(args)`, which returns the exit code
      (None is 0), and perhaps `ERRORS`, its own beside those of jobs.
  """
  terminal.guard_streams()
  for name in ("httpx", "httpx2", "botocore", "aiobotocore"):  # which log every request
    logging.getLogger(name).setLevel(logging.WARNING)
  signal.signal(signal.SIGINT, signal.default_int_handler)
  before = set(flags.FLAGS)
  command.define_flags()
  own = [name for name in flags.FLAGS if name not in before]
  app.run(lambda _: _guarded(lambda: command.main(flags.FLAGS), getattr(command, "ERRORS", ())),
          flags_parser=lambda argv: _guarded(lambda: _parse(argv, command.__doc__, own), (), sys.exit))


def define_config() -> None:
  """The flag --config, which every command that runs a model needs."""
  config_flags.DEFINE_config_file("config", None, "Configuration: a file, or one that comes with "
                                  f"batchjax: {', '.join(packaged.configs())}.")
  flags.mark_flag_as_required("config")


def define_input(rows: str, examples: Sequence[str] = ()) -> None:
  """The flags --input, whose rows are called so and which may name one of the examples, and --limit."""
  named = f"; or the name of an example: {', '.join(examples)}" if examples else ""
  flags.DEFINE_string("input", None, f"{rows}: .jsonl, .jsonl.gz or .parquet{named}.", required=True)
  flags.DEFINE_integer("limit", None, "Only the first so many rows of the input.", lower_bound=1)


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


def _parse(argv: Sequence[str], document: str, own: Sequence[str]) -> list[str]:
  """What is left of the command line once the flags are taken; raises ConfigError.

  Args:
    argv: the command line.
    document: what --help begins with.
    own: names of the command's own flags.
  """
  if asked := {"-h", "--h", "-?", "-help", "--help", "--helpshort", "--helpfull"} & set(argv[1:]):
    print(help_text.of_command(document, [flags.FLAGS[name] for name in own],
                               has_all="--helpfull" in asked))
    raise SystemExit(0)
  _check_overrides(argv)
  argv = packaged.with_config_path(argv)
  try:
    left = flags.FLAGS(argv)
    if "config" in flags.FLAGS:
      getattr(flags.FLAGS["config"].value, "lock", None)  # raises where the file could not be read
  except Exception as error:  # whatever a configuration file raises
    raise ConfigError(_explain(error, packaged.config_path(argv))) from error
  if len(left) > 1:
    raise ConfigError(f"unexpected arguments {left[1:]}: flags begin with --; see --help")
  return left


def _check_overrides(argv: Sequence[str]) -> None:
  """Raises ConfigError for `--config.<name>` where a job has no such field."""
  known = help_text.fields()
  for arg in argv[1:]:
    flag = re.match(r"--?(?:no)?config\.([^=]+)", arg)
    if not flag or flag[1] in known:
      continue
    near = [f"--config.{field}" for field in difflib.get_close_matches(flag[1], known, n=3)
            or [field for field in known if field.startswith(f"{flag[1]}.")][:3]]
    hint = f"did you mean {' or '.join(near)}?" if near else "--help lists them"
    raise ConfigError(f"{flag[0]} is no field of the configuration: {hint}")


def _explain(error: Exception, path: str) -> str:
  """One sentence on why flags or the configuration file cannot be used."""
  # Libraries wrap what a configuration file raises, in texts that hold its traceback.
  while (inner := error.__cause__ or error.__context__) and any(text in str(error) for text in (
      "Error whilst parsing config file", "Configuration is not available")):
    error = inner
  if isinstance(error, flags.Error):
    if missing := re.findall(r"Flag (--\w+) must have a value other than None", str(error)):
      return f"{', '.join(missing)} must be given; see --help"
    name = re.match(r"flag --config\.([\w.]+)=", str(error))
    field = help_text.fields().get(name[1]) if name else None
    return f"{error}; " + (f"it takes {field.kind}" if field else "see --help")
  lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__)
           if os.path.abspath(frame.filename) == os.path.abspath(path.split(":")[0])]
  if not lines and isinstance(error, OSError):
    return f"--config={path} cannot be read: check the path"
  where = f"--config={path}{f', line {lines[-1]}' if lines else ''}"
  if isinstance(error, (ConfigError, ImportError)):
    return f"{where}: {error}{': install it' if str(error).startswith('No module') else ''}"
  return f"{where}: {type(error).__name__}: {error}: mend the file"
