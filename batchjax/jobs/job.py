"""A job directory: what makes a killed job go on, and every row finish exactly once."""

from collections.abc import Mapping
import contextlib
import dataclasses
import hashlib
from importlib import metadata
import json
import os
from pathlib import Path
from typing import Any

from absl import logging
from etils import epath
from jaxtyping import Bool
import numpy as np

from batchjax.io import files
from batchjax.io import journal
from batchjax.io import paths
from batchjax.io.carried import Carried
from batchjax.jobs import folder
from batchjax.jobs.folder import JobError

_PACKAGES = ("batchjax", "jax", "jaxlib", "libtpu", "flax", "numpy")
_FIELDS = ("identity", "versions", "finished")  # of a manifest
_CHUNK_BYTES = 1 << 20


class JobMismatch(JobError):
  """The directory belongs to a job with another input or other settings."""


@dataclasses.dataclass(frozen=True)
class Finished:
  """How a job ended.

  Attributes:
    num_outputs: rows of the output file.
    num_errors: rows of the error file.
    was_finished: both files were there already, and nothing was done.
    unit: what a row of the output is called.
  """

  num_outputs: int
  num_errors: int
  was_finished: bool
  unit: str = "completions"

  def __str__(self) -> str:
    counts = f"{self.num_outputs} {self.unit}, {self.num_errors} errors"
    return f"already finished: {counts}; nothing to do" if self.was_finished else counts


class Job:
  """An open job; made by `open_job`, and a context manager that releases it.

  Attributes:
    directory: where its files lie.
    id: 16 hex digits that stand for the identity.
  """

  def __init__(self, directory: Path, lock_fd: int, manifest: dict[str, Any], sync_secs: float):
    self.directory = directory
    self.id = _job_id(manifest["identity"])
    self._manifest = manifest
    self._lock_fd = lock_fd
    self._sync_secs = sync_secs
    self._journal: journal.Journal | None = None

  def __enter__(self) -> "Job":
    return self

  def __exit__(self, *error: Any) -> None:
    self.close()

  def close(self) -> None:
    """Puts the journal on disk and lets other processes have the job."""
    try:
      if self._journal:
        self._journal.close()
    finally:
      os.close(self._lock_fd)

  def begin(self, num_rows: int) -> Bool[np.ndarray, "num_rows"]:
    """Opens the journal of this many input rows, once; returns which have an output or an error.

    Raises:
      JournalError: it is damaged, or holds rows of another job.
    """
    self._journal = journal.Journal(self.directory / folder.JOURNAL, self.id, num_rows, self._sync_secs)
    return self._journal.finished_rows

  def discard_if_empty(self) -> None:
    """Removes a job without an output, so that its input and settings may be corrected."""
    if journal.survey(self.directory / folder.JOURNAL)[1]:
      return
    folder.clear(self.directory)
    (self.directory / "lock").unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # something else lies in it
      self.directory.rmdir()

  def append(self, index: int, output: dict[str, Any]) -> None:
    """Records the output object of a row; raises JournalError if the row has one already."""
    self._journal.append(index, "output", output)

  def append_error(self, index: int, error: dict[str, Any]) -> None:
    """Records the error object of a row; raises JournalError if the row has one already."""
    self._journal.append(index, "error", error)

  def finish(self, output_path: str | Path, error_path: str | Path,
             carried: Carried | None = None) -> Finished:
    """Writes both files in input order, each atomically, where they are not there as written before.

    The error file is written even if it is empty, so that none is left from before.

    Args:
      output_path, error_path: of this machine or a store, where a file is as written if its size is.
      carried: what the rows of the input carry through to either.

    Raises:
      JobError: rows are unfinished, or the input is not what it was when the job began.
      InputError: a path cannot be written.
    """
    finished = self._journal.finished_rows
    unfinished = np.flatnonzero(~finished)
    if unfinished.size:
      raise JobError(f"{self.directory}: {unfinished.size} of {finished.size} rows are unfinished, the "
                     f"first at index {unfinished[0]}: run the job to its end")
    before = self._manifest["finished"]
    targets = {"output": output_path, "error": error_path}
    to_write = [kind for kind, path in targets.items()
                if not before or not _is_sealed(path, before[kind])]
    for kind in to_write:
      files.check_output(targets[kind])
    if carried and to_write and hash_file(carried.path) != self._manifest["identity"]["input"]:
      raise JobError(f"{carried.path} was changed while the job ran, and the output has fields of its "
                     "rows: put back what it was and run the same command again; finished rows are kept")
    seals = dict(before or {})
    for kind in to_write:
      if before:
        logging.warning("%s is not as this job wrote it: written again from the journal",
                        targets[kind])
      self._journal.sync()
      rows = self._journal.rows(kind)
      with paths.staged(targets[kind], self.directory) as local:
        if carried:
          files.write_rows(local, carried.join(rows), carried.types)
        else:
          files.write_rows(local, rows)
        seals[kind] = _seal(local)
    counts = [self._journal.num_finished(kind) for kind in targets]
    if to_write:
      self._manifest = self._manifest | {"finished": seals | {"num_outputs": counts[0]}}
      files.write_sealed(self.directory / folder.MANIFEST, self._manifest)
    return Finished(*counts, was_finished=not to_write)


def open_job(directory: str | Path, identity: dict[str, Any], *, overwrite: bool = False,
             pins: Mapping[str, str] | None = None, sync_secs: float = 0.5) -> Job:
  """Makes a job's directory or opens it again, and locks it.

  A directory in which no row has an output is taken over; a manifest that is
  lost or damaged is made again where the journal's rows are this job's.

  Args:
    directory: local; made if missing.
    identity: all that the outputs depend on (hashes, settings), as JSON values.
      Package versions are kept beside it for information; they may differ.
    overwrite: move a directory that is there aside, and start anew.
    pins: names of the Hub to their commits, kept among the versions for `read_pins`.
    sync_secs: least time between two waits for the disk.

  Raises:
    JobMismatch: the directory was made with another identity.
    JobError: another process runs the job, or its manifest is damaged.
  """
  directory = Path(directory)
  if overwrite and os.path.lexists(directory):
    logging.warning("%s is moved to %s", directory, folder.move_aside(directory))
  lock_fd = folder.lock(directory)
  try:
    folder.check(directory)
    identity = json.loads(_canonical(identity))
    return Job(directory, lock_fd, _manifest(directory, identity, pins or {}), sync_secs)
  except BaseException:
    os.close(lock_fd)
    raise


def read_pins(directory: str | Path) -> dict[str, str]:
  """The `pins` of the job that was in a directory; empty where its manifest is lost or damaged."""
  try:
    return files.read_sealed(Path(directory) / folder.MANIFEST, *_FIELDS)["versions"]
  except files.DamagedFile:
    return {}


def _manifest(directory: Path, identity: dict[str, Any], pins: Mapping[str, str]) -> dict[str, Any]:
  """The manifest of a locked directory, made where there is none of this job."""
  path, old, damage = directory / folder.MANIFEST, None, None
  try:
    old = files.read_sealed(path, *_FIELDS)
    if old["identity"] == identity:
      return old
  except files.DamagedFile as e:
    damage = e
  jobs, has_output = journal.survey(directory / folder.JOURNAL)
  # The journal of a finished job may be gone, but not its output.
  has_output |= bool(old and old["finished"] and old["finished"].get("num_outputs", 1))
  if jobs != {_job_id(identity)}:
    if has_output and old is None:
      raise JobError(f"{damage}, and its journal is not of this job alone: restore it, name another "
                     "output, or start anew with --overwrite") from damage
    if has_output:
      raise JobMismatch(_difference(directory, old["identity"], identity))
    folder.clear(directory)
  else:
    logging.warning("%s: made again, the journal's rows are this job's",
                    damage or f"{path} is another job's")
  manifest = {"identity": identity, "versions": _versions() | pins, "finished": None}
  files.write_sealed(path, manifest)
  return manifest


def hash_file(path: epath.PathLike) -> str:
  """The SHA-256 of a local or remote file as hex digits, read in pieces.

  Raises:
    InputError: the file cannot be opened.
  """
  digest = hashlib.sha256()
  with paths.open_input(path) as f, paths.store_errors(path, "read"):
    while chunk := f.read(_CHUNK_BYTES):
      digest.update(chunk)
  return digest.hexdigest()


def _seal(path: Path) -> dict[str, Any] | None:
  """Size and hash of a file; None where there is none."""
  if not path.is_file():
    return None
  return {"bytes": path.stat().st_size, "sha256": hash_file(path)}


def _is_sealed(path: str | Path, seal: dict[str, Any]) -> bool:
  """Whether a file is as it was written; one in a store is not read for that, its size tells."""
  if paths.is_remote(path):
    return paths.stored_bytes(path) == seal["bytes"]
  return _seal(Path(path)) == seal


def _canonical(identity: dict[str, Any]) -> str:
  return json.dumps(identity, sort_keys=True, ensure_ascii=False, separators=(",", ":"))


def _job_id(identity: dict[str, Any]) -> str:
  text = _canonical(identity).encode("utf-8", "surrogatepass")  # names of files may hold any byte
  return hashlib.sha256(text).hexdigest()[:16]


def _versions() -> dict[str, str]:
  versions = {}
  for name in _PACKAGES:
    with contextlib.suppress(metadata.PackageNotFoundError):
      versions[name] = metadata.version(name)
  return versions


def _difference(directory: Path, old: dict[str, Any], new: dict[str, Any]) -> str:
  before, after = _flatten(old), _flatten(new)
  changed = [f"{name}: {before.get(name, '(absent)')} -> {after.get(name, '(absent)')}"
             for name in sorted(before | after) if before.get(name) != after.get(name)]
  return (f"{directory} belongs to a job with other settings (then -> now): {'; '.join(changed)}. "
          "Restore them to go on with that job, name another output, or start anew with --overwrite")


def _flatten(value: Any, name: str = "") -> dict[str, str]:
  """Each leaf under its dotted path, as JSON text."""
  if not isinstance(value, dict) or not value:
    return {name: json.dumps(value, ensure_ascii=False)}
  leaves = {}
  for key, item in value.items():
    leaves |= _flatten(item, f"{name}.{key}" if name else key)
  return leaves
