"""How the parts of a model come to a job, and how JAX is set up for it."""

from collections.abc import Callable
import dataclasses
import os
from typing import Any

from absl import logging
import jax

from batchjax import weights
from batchjax.config import ConfigError, MeshConfig, ModelConfig, ModelSource
from batchjax.models import Transformer
from batchjax.plan.memory import DEVICE_SHARE
from batchjax.text.tokenizer import load_tokenizer, Tokenizer


def read_tokenizer(source: ModelSource) -> Tokenizer:
  """The tokenizer at `source.tokenizer`, or beside the weights.

  Raises:
    ConfigError: none is named, or it is of no known kind.
  """
  path = source.tokenizer or source.path
  if not path:
    raise ConfigError("model.tokenizer is empty, and random weights have none beside them: name "
                      "a folder, a tokenizer.json, a .model or a .gguf file")
  try:
    return load_tokenizer(path, source.split_special_tokens)
  except ValueError as e:
    raise ConfigError(f"{'model.tokenizer' if source.tokenizer else 'model.path'}: {e}") from e


@dataclasses.dataclass(frozen=True)
class Loaders:
  """How the parts of a model are loaded; tests put a fake model here."""

  config: Callable[[ModelSource], ModelConfig] = weights.load_config
  tokenizer: Callable[[ModelSource], Tokenizer] = read_tokenizer
  model: Callable[[ModelSource, MeshConfig], weights.Model] = weights.load_model
  module_class: Callable[..., Any] = Transformer
  shapes: Callable[[ModelConfig, MeshConfig], Any] = weights.stored_shapes

  def read(self, source: ModelSource) -> tuple[ModelConfig, Tokenizer]:
    """Configuration and tokenizer; what either takes for the end of a text or turn ends a sample.

    The log names these tokens.
    """
    config, tokenizer = self.config(source), self.tokenizer(source)
    ends = {"model": config.eos_token_ids,
            "tokenizer": [i for i in tokenizer.eos_token_ids if i < config.vocab_size]}
    token_ids = tuple(dict.fromkeys(i for ids in ends.values() for i in ids))
    shown = [f"{i} {tokenizer.token_name(i).decode('utf-8', 'replace')!r} "
             f"({', '.join(name for name, ids in ends.items() if i in ids)})" for i in token_ids]
    logging.info("end tokens: %s", ", ".join(shown) or "none, samples end by length or stop string")
    return dataclasses.replace(config, eos_token_ids=token_ids), tokenizer

  def load(self, source: ModelSource, config: ModelConfig,
           mesh: MeshConfig = MeshConfig()) -> weights.Model:
    """The model on its devices, with the end tokens of `config`, which `read` returned."""
    model = self.model(source, mesh)
    return dataclasses.replace(model, config=dataclasses.replace(
        model.config, eos_token_ids=config.eos_token_ids))

  def begin(self, source: ModelSource, config: ModelConfig, mesh: MeshConfig) -> weights.LoadingModel:
    """As `load`, in a thread, so that planning and compiling need not wait."""
    return weights.LoadingModel(config, lambda: self.shapes(config, mesh),
                                lambda: self.load(source, config, mesh))


def configure_jax() -> jax.Device:
  """Gives JAX most of the device's memory; to be called before the first use of a device, which it returns.

  Raises:
    ConfigError: there is none.
  """
  os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", str(DEVICE_SHARE))
  try:
    return jax.devices()[0]
  except RuntimeError as e:  # JAX_PLATFORMS names what is not here
    raise ConfigError(f"JAX finds no device ({e}): set JAX_PLATFORMS to what this machine has, such as "
                      "cpu") from e
