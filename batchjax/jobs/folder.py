"""The folder of a job: its own files, who holds it, and what becomes of one that is not wanted."""

import fcntl
import itertools
import os
from pathlib import Path
import re

from batchjax.io import files
from batchjax.io import paths

MANIFEST, JOURNAL, PREPARED, REQUESTS = ("manifest.json", "journal.jsonl", "prepared.json",
                                         "requests.arrow")
# In the order in which they are removed: what is left after a kill is of no other job.
_OWN = (PREPARED, REQUESTS, "plan.json", "metrics.jsonl", JOURNAL, MANIFEST)


class JobError(RuntimeError):
  """The job directory cannot be used as asked; the message says why and the remedy."""


def directory_of(output_path: str | Path, job_dir: str = "") -> Path:
  """Where a job that writes this output keeps its state: always on this machine.

  `job_dir` where it is given, else `<output>.job`; of an output in a store that name
  below `~/.local/state/batchjax`, so that the same command finds it from any folder.

  Raises:
    JobError: `job_dir` is of a store, or a folder with something else in it.
  """
  if job_dir:
    directory = Path(job_dir).expanduser()
    if paths.is_remote(job_dir):
      raise JobError(f"job_dir={job_dir}: a job's folder is on this machine: name a local one")
    if directory.is_dir() and any(directory.iterdir()) and not (directory / "lock").is_file():
      raise JobError(f"job_dir={job_dir} is no job's folder and not empty: name another")
    return directory
  if not paths.is_remote(output_path):
    return Path(f"{output_path}.job")
  scheme, _, rest = str(output_path).partition("://")
  rest = os.path.normpath(f"/{rest}")  # no ".." leads out of the folder
  return Path("~/.local/state/batchjax", scheme).expanduser() / f"{rest[1:]}.job"


def lock(directory: Path) -> int:
  """Makes the folder and those above it if missing, and holds it until the descriptor is closed.

  Raises:
    JobError: another process holds it, or it is no folder.
    OSError: it cannot be written.
  """
  try:
    directory.mkdir(parents=True, exist_ok=True)
  except FileExistsError as e:
    raise JobError(f"{directory} is not a folder: move it away, or name another output") from e
  path = directory / "lock"
  fd = files.open_regular(path, os.O_RDWR | os.O_CREAT, 0o600)
  try:
    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    if not path.exists() or not os.path.samestat(os.fstat(fd), path.lstat()):
      raise JobError(f"{directory} was removed by another process: run the same command again")
    with files.naming(path):
      os.truncate(fd, 0)
      os.write(fd, str(os.getpid()).encode())
  except BlockingIOError as e:
    holder = re.match(rb"\d+", os.read(fd, 32))
    os.close(fd)
    raise JobError(f"{directory} is in use by process {holder[0].decode() if holder else 'unknown'}: "
                   "wait for it or stop it, then run the same command again") from e
  except BaseException:
    os.close(fd)
    raise
  return fd


def check(directory: Path) -> None:
  """Raises OSError where one of the job's names is no file, or none can be made."""
  for name in _OWN:
    files.check_regular(directory / name)
  files.check_writable(directory / MANIFEST)


def clear(directory: Path) -> None:
  """Removes a job's own files; the lock and what others put there stay."""
  for name in _OWN:
    (directory / name).unlink(missing_ok=True)


def move_aside(directory: Path) -> Path:
  """Gives a folder the first free name of `<name>.1`, `<name>.2`, ...; returns it.

  Raises:
    JobError: another process holds it.
  """
  held = directory / "lock"
  fd = lock(directory) if held.is_file() and not held.is_symlink() else None
  try:
    names = (directory.with_name(f"{directory.name}.{number}") for number in itertools.count(1))
    target = next(path for path in names if not os.path.lexists(path))
    directory.rename(target)
  finally:
    if fd is not None:
      os.close(fd)
  return target
