"""A job directory: what makes a killed job go on, and every row finish exactly once."""

import contextlib
import dataclasses
import fcntl
import hashlib
from importlib import metadata
import json
import os
from pathlib import Path
from typing import Any

from etils import epath
from jaxtyping import Bool
import numpy as np

from batchjax.io import files
from batchjax.io import records
from batchjax.io.journal import Journal

_PACKAGES = ("batchjax", "jax", "jaxlib", "libtpu", "flax", "numpy")
_CHUNK_BYTES = 1 << 20


class JobError(RuntimeError):
  """The job directory cannot be used as asked; the message says why and the remedy."""


class JobMismatch(JobError):
  """The directory belongs to a job with another input or other settings."""


@dataclasses.dataclass(frozen=True)
class Finished:
  """How a job ended.

  Attributes:
    num_outputs: rows of the output file.
    num_errors: rows of the error file.
    was_finished: both files were there already, and nothing was done.
  """

  num_outputs: int
  num_errors: int
  was_finished: bool

  def __str__(self) -> str:
    counts = f"{self.num_outputs} completions, {self.num_errors} errors"
    return f"already finished: {counts}; nothing to do" if self.was_finished else counts


class Job:
  """An open job; made by `open_job`, and a context manager that releases it.

  Attributes:
    directory: where its files lie.
    id: 16 hex digits that stand for the identity.
  """

  def __init__(self, directory: Path, lock_fd: int, manifest: dict[str, Any], sync_secs: float):
    self.directory = directory
    self.id = hashlib.sha256(_canonical(manifest["identity"]).encode()).hexdigest()[:16]
    self._manifest = manifest
    self._lock_fd = lock_fd
    self._journal = Journal(directory / "journal.jsonl", sync_secs)

  def __enter__(self) -> "Job":
    return self

  def __exit__(self, *error: Any) -> None:
    self.close()

  def close(self) -> None:
    """Puts the journal on disk and lets other processes have the job."""
    self._journal.close()
    os.close(self._lock_fd)

  def finished_rows(self, num_rows: int) -> Bool[np.ndarray, "num_rows"]:
    """Which rows of the input have an output or an error."""
    return self._journal.finished_rows(num_rows)

  def append(self, index: int, output: dict[str, Any]) -> None:
    """Records the output object of a row; raises JournalError if the row has one already."""
    self._journal.append(index, "output", output)

  def append_error(self, index: int, error: dict[str, Any]) -> None:
    """Records the error object of a row; raises JournalError if the row has one already."""
    self._journal.append(index, "error", error)

  def finish(self, output_path: str | Path, error_path: str | Path, num_rows: int) -> Finished:
    """Writes both files in input order, each atomically; a second call finds them there.

    The error file is written even if it is empty, so that none is left from before.

    Raises:
      JobError: rows are unfinished.
      InputError: a path cannot be written.
    """
    unfinished = np.flatnonzero(~self.finished_rows(num_rows))
    if unfinished.size:
      raise JobError(f"{self.directory}: {unfinished.size} of {num_rows} rows are unfinished, the "
                     f"first at index {unfinished[0]}: run the job to its end")
    counts = self._journal.num_finished("output"), self._journal.num_finished("error")
    paths = [str(Path(path).absolute()) for path in (output_path, error_path)]
    if self._manifest["finished"] == paths and all(Path(path).exists() for path in paths):
      return Finished(*counts, was_finished=True)
    for path in paths:
      files.check_output(path)
    self._journal.sync()
    files.write_rows(Path(paths[0]), self._journal.rows("output"))
    files.write_rows(Path(paths[1]), self._journal.rows("error"))
    self._manifest = self._manifest | {"finished": paths}
    _write_manifest(self.directory, self._manifest)
    return Finished(*counts, was_finished=False)


def open_job(directory: str | Path, identity: dict[str, Any], *, sync_secs: float = 0.5) -> Job:
  """Makes a job's directory or opens it again, and locks it.

  Args:
    directory: local; made if missing.
    identity: all that the outputs depend on (hashes, settings), as JSON values.
      Package versions are kept beside it for information; they may differ.
    sync_secs: least time between two waits for the disk.

  Raises:
    JobMismatch: the directory was made with another identity.
    JobError: another process runs the job, or its manifest is damaged.
    JournalError: its journal is damaged.
  """
  directory = Path(directory)
  directory.mkdir(parents=True, exist_ok=True)
  lock_fd = _lock(directory)
  try:
    identity = json.loads(_canonical(identity))
    path = directory / "manifest.json"
    if path.exists():
      manifest = _read_manifest(path)
      _check_identity(directory, manifest["identity"], identity)
    elif (directory / "journal.jsonl").exists():
      raise JobError(f"{directory} has a journal but no manifest.json: restore it, or delete the "
                     "directory to start anew")
    else:
      manifest = {"identity": identity, "versions": _versions(), "finished": None}
      _write_manifest(directory, manifest)
    return Job(directory, lock_fd, manifest, sync_secs)
  except BaseException:
    os.close(lock_fd)
    raise


def hash_file(path: epath.PathLike) -> str:
  """The SHA-256 of a local or remote file as hex digits, read in pieces.

  Raises:
    InputError: the file cannot be opened.
  """
  digest = hashlib.sha256()
  with records.open_input(path) as f:
    while chunk := f.read(_CHUNK_BYTES):
      digest.update(chunk)
  return digest.hexdigest()


def _lock(directory: Path) -> int:
  fd = os.open(directory / "lock", os.O_RDWR | os.O_CREAT)
  try:
    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except BlockingIOError as e:
    holder = os.read(fd, 32).decode().strip()
    os.close(fd)
    raise JobError(f"{directory} is in use by process {holder or 'unknown'}: wait for it or stop "
                   "it, then run the same command again") from e
  os.truncate(fd, 0)
  os.write(fd, str(os.getpid()).encode())
  return fd


def _canonical(identity: dict[str, Any]) -> str:
  return json.dumps(identity, sort_keys=True, ensure_ascii=False, separators=(",", ":"))


def _read_manifest(path: Path) -> dict[str, Any]:
  try:
    manifest = json.loads(path.read_text("utf-8"))
    return {name: manifest[name] for name in ("identity", "versions", "finished")}
  except (ValueError, KeyError, TypeError) as e:
    raise JobError(f"{path} is damaged ({e!r}): restore it, or delete {path.parent} "
                   "to start anew") from e


def _write_manifest(directory: Path, manifest: dict[str, Any]) -> None:
  with files.atomic(directory / "manifest.json") as f:
    f.write((json.dumps(manifest, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode())


def _versions() -> dict[str, str]:
  versions = {}
  for name in _PACKAGES:
    with contextlib.suppress(metadata.PackageNotFoundError):
      versions[name] = metadata.version(name)
  return versions


def _check_identity(directory: Path, old: dict[str, Any], new: dict[str, Any]) -> None:
  before, after = _flatten(old), _flatten(new)
  changed = [f"  {name}: {before.get(name, '(absent)')} -> {after.get(name, '(absent)')}"
             for name in sorted(before | after) if before.get(name) != after.get(name)]
  if changed:
    raise JobMismatch("\n".join([
        f"{directory} belongs to a job with other settings (then -> now):", *changed,
        "Restore them to go on with that job, name another output, or delete the directory "
        "to start anew."]))


def _flatten(value: Any, name: str = "") -> dict[str, str]:
  """Each leaf under its dotted path, as JSON text."""
  if not isinstance(value, dict) or not value:
    return {name: json.dumps(value, ensure_ascii=False)}
  leaves = {}
  for key, item in value.items():
    leaves |= _flatten(item, f"{name}.{key}" if name else key)
  return leaves
