"""Files that appear whole or not at all, and are what they were written as.

A job's own files are opened by `open_regular` alone, so that a link or a pipe planted among
them is neither followed nor opened.
"""

from collections.abc import Iterable, Iterator, Mapping
import contextlib
import errno
import gzip
import io
import json
import os
from pathlib import Path
import stat
import types as types_lib
from typing import Any, BinaryIO
import zlib

import pyarrow as pa

from batchjax.io import parquet_output
from batchjax.io import paths
from batchjax.io import records
from batchjax.io.json_rows import dump
from batchjax.io.paths import InputError
from batchjax.io.records import file_format

_KINDS = {stat.S_IFLNK: "a symbolic link", stat.S_IFIFO: "a pipe", stat.S_IFDIR: "a directory",
          stat.S_IFSOCK: "a socket"}


class DamagedFile(RuntimeError):
  """A file of a job is not as it was written; the message names it."""


class NotRegular(OSError):
  """A link, a pipe or a directory stands where a file should; the message names the remedy."""


def check_regular(path: Path) -> None:
  """Raises NotRegular where something other than a file has this name; nothing may have it."""
  try:
    mode = path.lstat().st_mode
  except FileNotFoundError:
    return
  if not stat.S_ISREG(mode):
    raise NotRegular(f"{path} is {_KINDS.get(stat.S_IFMT(mode), 'a device')}, not a file of its "
                     "own: remove it and run the same command again")


def open_regular(path: str | Path, flags: int = os.O_RDONLY, mode: int = 0o666) -> int:
  """A descriptor of a file; an `opener` of `open`, so that links and pipes are not opened.

  Raises:
    NotRegular: the path is something else.
  """
  check_regular(Path(path))
  fd = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK, mode)
  if not stat.S_ISREG(os.fstat(fd).st_mode):  # it was put there since
    os.close(fd)
    raise NotRegular(f"{path} was replaced while it was opened: run the same command again")
  return fd


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
  """Gives errors of writing, which have none, the file's name."""
  try:
    yield
  except OSError as e:
    if e.strerror and e.filename is None:
      e.filename = str(path)
    raise


@contextlib.contextmanager
def atomic(path: Path) -> Iterator[BinaryIO]:
  """A file that takes its name once the block ends without an error and its bytes are on disk."""
  temporary = path.with_name(path.name + ".tmp")
  temporary.unlink(missing_ok=True)  # a killed run leaves one
  try:
    with naming(path), open(temporary, "xb", opener=open_regular) as f:
      yield f
      f.flush()
      os.fsync(f.fileno())
    os.replace(temporary, path)
  except BaseException:
    temporary.unlink(missing_ok=True)
    raise
  sync_directory(path.parent)


def write_sealed(path: Path, values: dict[str, Any]) -> None:
  """Writes an object atomically as JSON, with a checksum of the others under "crc"."""
  with atomic(path) as f:
    f.write((json.dumps({"crc": _crc(values)} | values, indent=2) + "\n").encode())


def read_sealed(path: Path, *names: str) -> dict[str, Any]:
  """The object that `write_sealed` wrote, which has these fields.

  Raises:
    DamagedFile: it is another one, or there is none.
    NotRegular: the path is no file.
  """
  try:
    with open(path, "rb", opener=open_regular) as f:
      values = json.loads(f.read())
    if values.pop("crc") != _crc(values) or values.keys() != set(names):
      raise ValueError("its checksum or its fields do not fit")
    return values
  except FileNotFoundError as e:
    raise DamagedFile(f"{path} is missing") from e
  except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
    raise DamagedFile(f"{path} is damaged ({e})") from e


def _crc(values: dict[str, Any]) -> str:
  return f"{zlib.crc32(json.dumps(values, sort_keys=True).encode()):08x}"


def sync_directory(path: Path) -> None:
  """Puts the names in a directory on disk."""
  fd = os.open(path, os.O_RDONLY)
  try:
    os.fsync(fd)
  finally:
    os.close(fd)


def check_writable(path: Path) -> None:
  """Raises OSError where `atomic` could not make a file beside this one."""
  temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")  # another process may write to .tmp
  os.close(open_regular(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL))
  temporary.unlink()


def check_output(path: str | Path) -> None:
  """Raises InputError where an output could not be written; call it before the work starts."""
  file_format(path)
  if paths.is_remote(path):
    paths.check_store(str(path))
    return
  target = Path(os.path.realpath(path))
  try:
    if target.is_dir():
      raise InputError(f"{path} is a directory: name the file to write")
    if not target.parent.is_dir():
      raise InputError(f"{path}: its directory does not exist; make it first")
    if target.exists():
      check_regular(target)
      if not target.stat().st_mode & 0o222:
        raise PermissionError(errno.EACCES, "the file is read-only")
      os.close(os.open(target, os.O_WRONLY))
    check_writable(target)
  except NotRegular as e:
    raise InputError(str(e)) from e
  except OSError as e:
    raise InputError(f"{path} cannot be written ({e.strerror}): make it and its directory "
                     "writable, or name another path") from e


def check_paths(input_path: str, outputs: dict[str, str]) -> None:
  """Raises InputError where the input cannot be read, an output not be written, or two are one.

  Args:
    input_path: see `records.read`.
    outputs: what each path is for, and the path.
  """
  for path in outputs.values():
    check_output(path)
  next(records.read(input_path))
  named = {"input": input_path} | outputs
  if len({os.path.realpath(path) for path in named.values()}) < len(named):
    raise InputError(f"{named} name one file twice: give each its own")
  for path in outputs.values():
    if (not paths.is_remote(input_path) and os.path.exists(path)
        and os.path.samefile(input_path, path)):
      raise InputError(f"{path} is the input under another name: name another file")


def write_rows(path: Path, rows: Iterable[dict[str, Any]],
               types: Mapping[str, pa.DataType] = types_lib.MappingProxyType({})) -> None:
  """Writes rows atomically as .jsonl, .jsonl.gz or .parquet; equal rows make equal bytes.

  Args:
    path: where to; a file that is there is replaced, where it is a link that which it names.
    rows: as `output` formats them, perhaps with further fields; iterated twice for Parquet, whose
      columns are those of the row forms that occur, and the further fields.
    types: of further fields in Parquet; see `parquet_output.write`.
  """
  check_output(path)
  suffix = file_format(path)
  with atomic(Path(os.path.realpath(path))) as f:
    if suffix == ".parquet":
      parquet_output.write(f, rows, types)
    elif suffix == ".jsonl.gz":
      with gzip.GzipFile("", "wb", compresslevel=6, fileobj=f, mtime=0) as packed:
        _write_lines(packed, rows)
    else:
      _write_lines(f, rows)


def _write_lines(f: io.BufferedIOBase, rows: Iterable[dict[str, Any]]) -> None:
  for row in rows:
    f.write(dump(row).encode("utf-8") + b"\n")
