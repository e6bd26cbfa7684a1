"""Compiled steps are kept: for later jobs of the process, and on disk for later processes.

What a step was compiled from is its key, so nothing is traced or lowered to find it. Entries on disk
are code: whoever can write to the folder can run programs as its user.
"""

import collections
from collections.abc import Sequence
import contextlib
import functools
import hashlib
import importlib
import inspect
import json
import os
import pathlib
import pickle
import stat
import tempfile
import threading
from typing import Any, NamedTuple

from absl import logging
import jax
from jax.experimental import serialize_executable
import jaxlib

from batchjax.config import ConfigError
from batchjax.plan.buckets import Bucket

_ROOTS = ("batchjax", "pallas_kernels")
_SUFFIX = ".step"
# What an entry that is damaged, or was made by other versions, may do to its reader.
_UNUSABLE = (ValueError, KeyError, TypeError, AttributeError, ImportError, EOFError, OSError,
             pickle.UnpicklingError, jax.errors.JaxRuntimeError)
# Settings that say where and how loudly JAX works, not what it compiles; the device is in the key.
_OTHER_SETTINGS = ("cache", "log", "traceback", "dump", "profil", "hlo_source_file", "platform",
                   "visible_devices")


class StepKey(NamedTuple):
  """What one compiled step is of.

  Attributes:
    base: digest of all but the sizes: model, features, device, versions, settings, program sources.
    bucket: its shape.
    num_slots, num_pages: sizes of the state that it works on.
  """

  base: str
  bucket: Bucket
  num_slots: int
  num_pages: int

  def __str__(self) -> str:
    return ".".join(map(str, (self.base, *self.bucket, self.num_slots, self.num_pages)))

  @classmethod
  def parse(cls, text: str) -> "StepKey | None":
    """The inverse of `str`; None where the text is no key."""
    base, *fields = text.split(".")
    if len(fields) != len(Bucket._fields) + 2 or not all(f.isdecimal() for f in fields[1:]):
      return None
    kind, *sizes = fields[0], *map(int, fields[1:])
    return cls(base, Bucket(kind, *sizes[:-2]), *sizes[-2:])


class CompiledStep(NamedTuple):
  """An executable and the device memory it takes while it runs (see `CompileRecord`)."""

  executable: Any
  argument_bytes: int
  temp_bytes: int


class StepMemory:
  """The compiled steps of this process, the latest used `max_entries` of them."""

  def __init__(self, max_entries: int):
    self._max_entries = max_entries
    self._steps: collections.OrderedDict[StepKey, CompiledStep] = collections.OrderedDict()
    self._lock = threading.Lock()

  def get(self, key: StepKey) -> CompiledStep | None:
    """The step of a key, or None."""
    with self._lock:
      if key in self._steps:
        self._steps.move_to_end(key)
      return self._steps.get(key)

  def put(self, key: StepKey, step: CompiledStep) -> None:
    """Keeps a step; the one not used for longest may have to go."""
    with self._lock:
      self._steps[key] = step
      while len(self._steps) > self._max_entries:
        self._steps.popitem(last=False)

  def keys(self) -> list[StepKey]:
    """Of all steps that are kept."""
    with self._lock:
      return list(self._steps)

  def clear(self) -> None:
    """Drops all."""
    with self._lock:
      self._steps.clear()


@functools.cache
def compiled_steps() -> StepMemory:
  """The compiled steps that later jobs of this process take up again; `clear` drops them.

  >>> batchjax.compiled_steps().clear()
  >>> batchjax.compiled_steps().keys()
  []
  """
  return StepMemory(max_entries=64)


class StepFolder:
  """Compiled steps on disk, a file each, written atomically."""

  def __init__(self, directory: str, max_bytes: int):
    """Makes the folder, for its owner alone.

    Raises:
      ConfigError: it belongs to somebody else, or others may write to it.
    """
    self._directory, self._max_bytes = pathlib.Path(directory).expanduser(), max_bytes
    try:
      self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
      status = self._directory.stat()
    except OSError as e:
      raise ConfigError(f"engine.compilation_cache_dir={directory!r}: {e}") from e
    if status.st_uid != os.getuid() or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
      raise ConfigError(
          f"engine.compilation_cache_dir={directory!r} holds programs that would be run, and others "
          f"may write to it: chmod go-w {self._directory}, name a folder of your own, or '' for none")

  def keys(self) -> list[StepKey]:
    """Of all entries, whether or not they turn out to be whole."""
    keys = (StepKey.parse(path.name.removesuffix(_SUFFIX))
            for path in self._directory.glob(f"*{_SUFFIX}"))
    return [key for key in keys if key is not None]

  def get(self, key: StepKey, devices: Sequence[jax.Device]) -> CompiledStep | None:
    """Loads an entry for these devices; None, and a line in the log, where it cannot be used."""
    path = self._path(key)
    try:
      content = path.read_bytes()
    except FileNotFoundError:
      return None
    if devices[0].platform == "gpu":  # registers what Mosaic's compiled kernels call
      importlib.import_module("jax.experimental.mosaic.gpu")
    try:
      header_text, _, payload = content.partition(b"\n")
      header = json.loads(header_text)
      if header["key"] != str(key) or header["sha256"] != hashlib.sha256(payload).hexdigest():
        raise ValueError("its content is not what was written")
      executable = serialize_executable.deserialize_and_load(
          *pickle.loads(payload), backend=devices[0].client, execution_devices=devices)
      with contextlib.suppress(OSError):  # a folder that may only be read serves as well
        os.utime(path)
      return CompiledStep(executable, header["argument_bytes"], header["temp_bytes"])
    except _UNUSABLE as e:
      logging.warning("%s cannot be used, the step is compiled anew: %s", path, e)
      return None

  def put(self, key: StepKey, step: CompiledStep) -> None:
    """Keeps a step, and drops the entries not used for longest while there are too many bytes."""
    if step.executable.runtime_executable().client.platform == "cpu" and "callback" in step.executable.as_text():
      return  # an interpreted kernel: its program holds addresses of this process
    try:
      payload = pickle.dumps(serialize_executable.serialize(step.executable))
    except (ValueError, NotImplementedError, jax.errors.JaxRuntimeError) as e:
      logging.warning("the compiled step %s is not kept: %s", key, e)
      return
    header = {"key": str(key), "sha256": hashlib.sha256(payload).hexdigest(),
              "argument_bytes": step.argument_bytes, "temp_bytes": step.temp_bytes}
    try:
      with tempfile.TemporaryDirectory(dir=self._directory) as directory:
        path = pathlib.Path(directory) / "entry"
        path.write_bytes(json.dumps(header).encode() + b"\n" + payload)
        os.replace(path, self._path(key))
      self._trim()
    except OSError as e:  # a full disk, say: the job has its step all the same
      logging.warning("the compiled step %s is not kept: %s", key, e)

  def _path(self, key: StepKey) -> pathlib.Path:
    return self._directory / f"{key}{_SUFFIX}"

  def _trim(self) -> None:
    entries = sorted(((p.stat(), p) for p in self._directory.glob(f"*{_SUFFIX}")),
                     key=lambda entry: entry[0].st_mtime)
    total = sum(status.st_size for status, _ in entries)
    for status, path in entries[:-1]:  # the one just written stays
      if total <= self._max_bytes:
        return
      path.unlink(missing_ok=True)
      total -= status.st_size


def base_key(module: Any, device: jax.Device, **parts: Any) -> str:
  """A digest of all that a step's program depends on but its sizes.

  Args:
    module: whose `repr` names its fields.
    device: where it will run.
    **parts: values whose `repr` is the same in every process.
  """
  settings = {name: value for name, value in jax.config.values.items()
              if not any(word in name for word in _OTHER_SETTINGS)}
  text = repr((
      jax.__version__, jaxlib.__version__, device.platform, device.device_kind,
      device.client.platform_version, _processor() if device.platform == "cpu" else "",
      [os.environ.get(name) for name in ("XLA_FLAGS", "LIBTPU_INIT_ARGS")],
      sorted((name, repr(value)) for name, value in settings.items()),
      _sources(inspect.getsourcefile(type(module))), type(module).__qualname__, repr(module),
      sorted((name, repr(value)) for name, value in parts.items())))
  return hashlib.sha256(text.encode()).hexdigest()[:32]


@functools.cache
def _sources(*others: str | None) -> str:
  """A digest of the program text of our packages, and of other files."""
  root = pathlib.Path(__file__).parents[2]
  paths = [path for name in _ROOTS for path in (root / name).rglob("*")
           if path.suffix in (".py", ".json")]
  digest = hashlib.sha256()
  for path in [*sorted(paths), *(pathlib.Path(other) for other in others if other)]:
    digest.update(path.read_bytes())
  return digest.hexdigest()


@functools.cache
def _processor() -> str:
  """What tells processors apart for which programs differ."""
  try:
    lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
  except OSError:
    return ""
  return "".join(sorted({line for line in lines if line.startswith(("flags", "Features", "model name"))}))
