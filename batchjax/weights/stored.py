"""What every reader of a stored model offers: tensors under their Hugging Face names."""

import dataclasses
from collections.abc import Callable

import numpy as np

from batchjax.config import ConfigError


class WeightError(ConfigError):
  """A stored model cannot be read, or does not compute; the message names file, field and remedy."""


@dataclasses.dataclass(frozen=True)
class StoredTensors:
  """Tensors of one stored model, none of them read yet.

  Attributes:
    shapes: Hugging Face tensor name -> shape, from the files' headers.
    read: returns one tensor by name, in its stored dtype (quantised ones in float32).
    locate: says where a tensor lies, or should lie, for error messages.
  """

  shapes: dict[str, tuple[int, ...]]
  read: Callable[[str], np.ndarray]
  locate: Callable[[str], str]
