"""A model that was loaded on one device, laid out for a mesh."""

import dataclasses

import numpy as np

from batchjax.config import MeshConfig
from batchjax.sharding import make_mesh
from batchjax.weights import Model
from batchjax.weights.layout import Layout
from batchjax.weights.tree import flatten, nest


def on_mesh(model: Model, mesh: MeshConfig) -> Model:
  """The same model on the devices of a mesh; itself on one device, or without parameters."""
  if mesh.tensor == 1 or not model.params:
    return model
  layout = Layout(model.config, make_mesh(mesh))
  return dataclasses.replace(model, params=nest({
      path: layout.put(path, np.asarray(x)) for path, x in flatten(model.params).items()}))
