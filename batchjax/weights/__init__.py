"""Models from Hugging Face folders, GGUF files, Orbax checkpoints, or made at random."""

from collections.abc import Callable
import concurrent.futures
import dataclasses
import functools
import pathlib
import threading
from typing import Any

import jax

from batchjax import hub, models
from batchjax.config import ConfigError, MeshConfig, ModelConfig, ModelSource
from batchjax.sharding import make_mesh
from batchjax.weights import hf, orbax
from batchjax.weights.fuse import fuse, unfuse
from batchjax.weights.gguf import GgufFile
from batchjax.weights.layout import Layout
from batchjax.weights.random import random_params
from batchjax.weights.stored import WeightError
from batchjax.weights.tree import nest, param_shapes, shapes_of

__all__ = ("LoadingModel", "Model", "WeightError", "load_config", "load_hf_config", "load_model",
           "param_shapes", "save_hf", "save_orbax", "source_format", "stored_dtype", "stored_shapes")


@functools.partial(jax.tree_util.register_dataclass, data_fields=["params"], meta_fields=["config"])
@dataclasses.dataclass(frozen=True)
class Model:
  """A model ready to run, and a pytree of its parameters: gradients and optimizers take it whole.

  Attributes:
    config: its shapes, family and dtype.
    params: `{"params": nested dict of jax.Array}`, what `module.apply` takes; on a mesh laid out as
      `weights.layout.Layout` says.

  >>> halved = jax.tree.map(lambda p: p / 2, model)
  >>> type(halved).__name__, halved.config == model.config
  ('Model', True)
  """

  config: ModelConfig
  params: dict[str, Any]

  @property
  def shapes(self) -> dict[str, Any]:
    """Shapes and types in place of the parameters, and how a mesh splits them."""
    return shapes_of(self.params)


class LoadingModel:
  """A model on the way to its devices: steps can be compiled for its `shapes` meanwhile.

  Attributes:
    config: as of `Model`.
  """

  def __init__(self, config: ModelConfig, shapes_fn: Callable[[], Any], load: Callable[[], Model]):
    """Begins to load it, in a thread.

    Args:
      config: as of `Model`.
      shapes_fn: what `shapes` of the model will be.
      load: loads it.
    """
    self.config, self._shapes_fn = config, shapes_fn
    self._model: concurrent.futures.Future[Model] = concurrent.futures.Future()
    # A daemon, so that a process that is told to stop does not wait for weights.
    threading.Thread(target=self._load, args=(load,), daemon=True).start()

  def _load(self, load: Callable[[], Model]) -> None:
    try:
      self._model.set_result(load())
    except BaseException as error:  # raised where the parameters are asked for
      self._model.set_exception(error)

  @functools.cached_property
  def shapes(self) -> dict[str, Any]:
    """As of `Model`."""
    return self._shapes_fn()

  @property
  def params(self) -> dict[str, Any]:
    """As of `Model`, once they are there; raises what loading them raised."""
    return self._model.result().params


def source_format(source: ModelSource) -> str:
  """The source's format, found from its path where it says "auto".

  Raises:
    ConfigError: the path is none of the known formats.
  """
  if source.format != "auto":
    return source.format
  path = hub.local_path(source.path, "config")
  try:
    if path.is_file() and path.suffix == ".gguf":
      return "gguf"
    if (path / orbax.CONFIG).is_file():
      return "orbax"
    if (path / "config.json").is_file():
      return "hf"
  except OSError as error:  # no permission, or too long a name
    raise ConfigError(f"model.path={source.path!r} cannot be read ({error.strerror}): check its name "
                      "and its permissions") from error
  raise ConfigError(f"model.path={source.path!r} is neither a .gguf file nor a folder with "
                    f"config.json (Hugging Face) or {orbax.CONFIG} (Orbax), nor a name of the Hub "
                    "(org/name)")


def load_config(source: ModelSource) -> ModelConfig:
  """The model's configuration; reads metadata only and touches no device.

  Raises:
    ConfigError: the source is of no known format, damaged, or of a model that is not supported.
    WeightError: likewise, of a GGUF file.
  """
  match source_format(source):
    case "random":
      if source.shape not in models.SHAPES:
        raise ConfigError(f"model.shape={source.shape!r} is unknown; known: "
                          f"{sorted(models.SHAPES)}")
      config = models.SHAPES[source.shape]
    case "orbax":
      config = orbax.read_config(hub.local_path(source.path, "config"))
    case _:
      config = _config_of(source, load_hf_config(source))
  return dataclasses.replace(config, dtype=source.dtype)


def load_hf_config(source: ModelSource) -> dict[str, Any]:
  """The model's `config.json`; that of a GGUF file is made from its metadata.

  Raises:
    ConfigError: the source has none: it is random, or an Orbax checkpoint saved without.
  """
  path = hub.local_path(source.path, "config")
  match source_format(source):
    case "gguf":
      return GgufFile(path).hf_config()
    case "hf":
      return hf.read_config(path)
    case "orbax" if (path / "config.json").is_file():
      return hf.read_config(path)
  raise ConfigError(f"{source.path or source.shape} has no config.json; copy the one of the "
                    "model it was made from beside it")


def stored_dtype(source: ModelSource) -> str:
  """The dtype that loses nothing of what the source stores."""
  match source_format(source):
    case "hf":
      return hf.stored_dtype(hub.local_path(source.path))
    case "orbax":
      return orbax.read_config(hub.local_path(source.path)).dtype
  return "float32"


def stored_shapes(config: ModelConfig, mesh: MeshConfig = MeshConfig()) -> dict[str, Any]:
  """The `Model.shapes` of what `load_model` loads."""
  layout = Layout(config, make_mesh(mesh))
  return nest({path: layout.shape(path) for path in param_shapes(config)})


def load_model(source: ModelSource, mesh: MeshConfig = MeshConfig()) -> Model:
  """Loads the parameters onto their devices, in `source.dtype`.

  Host memory holds one parameter at a time, and one device's share of it, besides what the devices
  hold.

  Args:
    source: where the model comes from.
    mesh: the devices that share it, `EngineConfig.mesh` of what will run it.

  Raises:
    ConfigError: as `load_config`; or the devices are fewer, or the model does not divide among them.
    WeightError: a tensor is missing, superfluous, of the wrong shape, not where the index says,
      or out of range.

  >>> model = batchjax.load_model(batchjax.ModelSource(format="random", shape="tiny_llama", seed=1))
  >>> model.params["params"]["embed"]["embedding"].shape
  (256, 32)
  """
  path, devices = hub.local_path(source.path), make_mesh(mesh)
  if source_format(source) == "gguf":
    file = GgufFile(path)  # parsed once: its vocabulary takes seconds
    config = dataclasses.replace(_config_of(source, file.hf_config()), dtype=source.dtype)
    targets = models.name_map(config)
    return Model(config, fuse(config, targets, file.tensors(targets), devices))
  config = load_config(source)
  match source_format(source):
    case "random":
      params = random_params(config, source.seed, devices)
    case "orbax":
      params = orbax.restore(path, config, devices)
    case _:
      params = fuse(config, models.name_map(config), hf.open_tensors(path), devices)
  return Model(config, params)


def save_hf(path: str, model: Model, hf_config: dict[str, Any],
            max_shard_bytes: int = 5 << 30) -> None:
  """Writes a Hugging Face folder that loads again bit for bit.

  Args:
    path: of the folder, made if need be.
    model: what to write; tensors keep its dtype.
    hf_config: its `config.json`; the dtype in it is set to the model's.
    max_shard_bytes: a file holds at most this, or a single tensor.

  Raises:
    ConfigError: `hf_config` describes another model.
  """
  described = dataclasses.replace(models.config_from_hf(hf_config), dtype=model.config.dtype)
  if described != model.config:
    raise ConfigError(f"the config.json for {path} describes {described}, but the model is "
                      f"{model.config}")
  folder = pathlib.Path(path).expanduser()
  folder.mkdir(parents=True, exist_ok=True)
  hf.write_config(folder, hf_config, model.config.dtype)
  hf.write_tensors(folder, unfuse(models.name_map(model.config), model.params), max_shard_bytes)


def save_orbax(path: str, model: Model, hf_config: dict[str, Any] | None = None) -> None:
  """Writes an Orbax checkpoint that loads again bit for bit; refuses to overwrite one.

  Args:
    path: of the folder, made if need be.
    model: what to write; its configuration goes to `model_config.json`.
    hf_config: written too, as `config.json`; `save_hf` of the checkpoint needs it.
  """
  folder = pathlib.Path(path).expanduser()
  orbax.save(folder, model.config, model.params)
  if hf_config is not None:
    hf.write_config(folder, hf_config, model.config.dtype)


def _config_of(source: ModelSource, hf_config: dict[str, Any]) -> ModelConfig:
  try:
    return models.config_from_hf(hf_config)
  except ConfigError as error:
    raise ConfigError(f"{source.path}: {error}") from error
