"""A cloud store that is a folder: `gs://bucket/x`, through epath and fsspec, lies in `<root>/bucket/x`."""

import os

from etils.epath import backend
from fsspec import register_implementation
from fsspec.implementations.local import LocalFileSystem
from fsspec.registry import _registry


class StoreError(Exception):
  """Of no type that batchjax knows."""


class FolderStore(LocalFileSystem):
  """Objects as files.

  Attributes:
    root: the folder.
    broken: what fails: "open" to read, "write", "half" of a write, or "rename".
  """

  cachable = False
  root = ""
  broken: set[str] = set()

  def __init__(self, **kwargs):
    super().__init__(auto_mkdir=True)  # as in a store, folders need not be made

  @classmethod
  def _strip_protocol(cls, path):
    path = os.fspath(path)
    return f"{cls.root}/{path.removeprefix('gs://')}" if path.startswith("gs://") else path

  def _fail(self, name):
    if name in self.broken:
      raise StoreError(f"cannot {name}")

  def open(self, path, mode="rb", **kwargs):
    self._fail("write" if "w" in mode else "open")
    file = super().open(path, mode, **kwargs)
    if "half" in self.broken and "w" in mode:
      write = file.write
      file.write = lambda data: write(data[:len(data) // 2])
    return file

  def mv(self, path1, path2, **kwargs):
    self._fail("rename")
    super().mv(path1, path2)


def install(root):
  """Serves gs:// from a folder in this process, until `remove`."""
  FolderStore.root, FolderStore.broken = str(root), set()
  register_implementation("gcs", FolderStore, clobber=True)
  backend.fsspec_backend._get_filesystem.cache_clear()


def remove():
  """Gives gs:// back to the library for it."""
  _registry.pop("gcs", None)
  backend.fsspec_backend._get_filesystem.cache_clear()
