"""Files on this machine and, through `etils.epath`, in cloud stores (gs://, s3://, ...)."""

from collections.abc import Iterator
import contextlib
import os
import pathlib
import shutil
from typing import BinaryIO

from etils import epath

from batchjax.io.fields import one_line

_EXTRAS = {"gs": "gcs", "s3": "s3", "hf": "hub"}  # of setup.py, which bring the library of a store
_CHUNK_BYTES = 16 << 20


class InputError(ValueError):
  """An input cannot be read at all or an output not be written; the message says what to do."""


def is_remote(path: epath.PathLike) -> bool:
  """Whether the path is of a store."""
  return "://" in str(path)


@contextlib.contextmanager
def store_errors(path: epath.PathLike, doing: str) -> Iterator[None]:
  """Makes an InputError of what goes wrong with a path: libraries of stores have their own types."""
  scheme, _, rest = str(path).partition("://")
  try:
    yield
  except InputError:
    raise
  except ImportError as e:
    remedy = f"pip install 'batchjax[{_EXTRAS[scheme]}]'" if scheme in _EXTRAS else "install that"
    raise InputError(f"{path} cannot be {doing} ({one_line(e)}): {remedy}") from e
  except Exception as e:
    if isinstance(e, KeyError) and e.args == (f"{scheme}://",):  # which nobody registered
      raise InputError(f"{path}: paths that begin with {e} cannot be opened; "
                       "use a local path, gs:// or s3://") from e
    if not rest and not isinstance(e, OSError):
      raise
    remedy = ": check its name, your access to the store and the network" if rest else ""
    raise InputError(f"{path} cannot be {doing} ({one_line(e)}){remedy}") from e


def open_input(path: epath.PathLike) -> BinaryIO:
  """Opens a local or remote file for reading bytes; raises InputError where it cannot."""
  with store_errors(path, "opened"):
    source = epath.Path(path)
    if source.is_dir():
      raise InputError(f"{path} is a directory: name one file in it")
    if os.path.exists(source) and not os.path.isfile(source):
      raise InputError(f"{path} is a pipe or a device, which cannot be read twice: write its rows "
                       "to a file first")
    if not source.exists():
      raise InputError(f"{path} does not exist: check the path")
    return source.open("rb")


def check_store(path: str) -> None:
  """Raises InputError where `staged` could not write to a store; tries it with an empty file."""
  with store_errors(path, "written"):
    target = epath.Path(path)
    if target.is_dir():
      raise InputError(f"{path} is a directory: name the file to write")
    probe = target.with_name(f"{target.name}.{os.getpid()}.tmp")
    with probe.open("wb"):
      pass
    probe.unlink()


def stored_bytes(path: str) -> int | None:
  """The size of a file in a store; None where there is none."""
  with store_errors(path, "read"):
    target = epath.Path(path)
    return target.stat().length if target.exists() else None


@contextlib.contextmanager
def staged(path: epath.PathLike, directory: pathlib.Path) -> Iterator[pathlib.Path]:
  """The local file to write for a path; what is for a store is copied there when the block ends.

  In the store the file takes its name once all of it is there. What could not be
  copied stays in `directory`.

  Raises:
    InputError: it could not be copied; the message says where the file is.
  """
  if not is_remote(path):
    yield pathlib.Path(path)
    return
  target = epath.Path(path)
  local, temporary = directory / f"staged.{target.name}", target.with_name(f"{target.name}.tmp")
  yield local
  try:
    with store_errors(path, "written"), open(local, "rb") as source:
      with temporary.open("wb") as sink:
        shutil.copyfileobj(source, sink, _CHUNK_BYTES)
      if (num_bytes := temporary.stat().length) != local.stat().st_size:
        raise OSError(f"{num_bytes:,} of {local.stat().st_size:,} bytes arrived")
      temporary.replace(target)
  except InputError as e:
    raise InputError(f"{e}; the file is whole in {local}, and the same command again copies "
                     "it") from e
  local.unlink()
