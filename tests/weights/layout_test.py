"""Every loader lays a model out for a mesh as `Layout` says, without the whole of it on one device."""

import dataclasses
import pathlib
import threading

import jax
import numpy as np
import pytest

from batchjax import models, weights
from batchjax.config import ConfigError, MeshConfig, ModelSource
from batchjax.sharding import make_mesh
from batchjax.testing.on_mesh import on_mesh
from batchjax.weights.layout import Layout
from batchjax.weights.tree import flatten, param_shapes

GOLDENS = pathlib.Path(__file__).parents[1] / "goldens"
# Four query heads on two KV heads.
SOURCES = {
    "hf": ModelSource(str(GOLDENS / "qwen2")),
    "random": ModelSource(format="random", shape="tiny_llama", dtype="bfloat16")}

pytestmark = pytest.mark.usefixtures("quick_compiler")


def assert_equal(got, want):
  for path, x in flatten(want).items():
    y = flatten(got)[path]
    assert (y.sharding, y.dtype, y.shape) == (x.sharding, x.dtype, x.shape), path
    np.testing.assert_array_equal(np.asarray(y), np.asarray(x))


@pytest.mark.parametrize("kind, size", [("hf", 2), ("hf", 4), ("random", 4)])
def test_loaders_lay_out_for_a_mesh(kind, size):
  whole = weights.load_model(SOURCES[kind])
  got = weights.load_model(SOURCES[kind], MeshConfig(size))
  assert got.config == whole.config
  assert_equal(got.params, on_mesh(whole, MeshConfig(size)).params)


@pytest.mark.parametrize("size", [2, 4])
def test_a_checkpoint_of_one_device_restores_on_a_mesh(size, tmp_path):
  whole = weights.load_model(SOURCES["hf"])
  weights.save_orbax(str(tmp_path / "m"), whole)
  got = weights.load_model(ModelSource(str(tmp_path / "m")), MeshConfig(size))
  assert_equal(got.params, on_mesh(whole, MeshConfig(size)).params)


@pytest.mark.parametrize("size", [2, 4, 8])
def test_devices_hold_the_parameters_of_a_smaller_model(size):
  """Odd sizes are filled up with zeros, and products of shares add up to those of the whole."""
  config = dataclasses.replace(models.SHAPES["tiny_qwen2"], num_layers=1, layer_kinds=(), num_heads=8,
                               vocab_size=253, ffn_size=62)
  rng = np.random.default_rng(1)
  whole = {path: rng.normal(size=shape).astype(np.float32) / 4
           for path, shape in param_shapes(config).items()}
  layout = Layout(config, make_mesh(MeshConfig(size)))
  shares = {path: layout.put(path, x) for path, x in whole.items()}
  for path, shape in param_shapes(config.of_device(size)).items():
    held = shares[path].addressable_shards
    assert {x.data.shape for x in held} == {shape} and len({x.device for x in held}) == size
    assert layout.shape(path).shape == shares[path].shape
  device = lambda path, i: np.asarray(shares[f"layers_0/{path}"].addressable_shards[i].data)
  x = np.random.default_rng(0).normal(size=(3, config.hidden_size)).astype(np.float32)

  def ffn(gate_up, down):
    gate, up = np.split(x @ gate_up, 2, axis=1)
    return (np.maximum(gate, 0) * up) @ down

  def heads(qkv, out):
    """Each query head's own mix of its key and value: which stand beside it is what counts."""
    num_kv_heads, group = out.shape[:2]
    qkv = (x @ qkv).reshape(-1, num_kv_heads, group + 2, config.head_dim)
    mixed = qkv[:, :, :group] * qkv[:, :, group:group + 1] + qkv[:, :, group + 1:]
    return np.einsum("tkgh,kghd->td", mixed, out)

  for function, names in ((ffn, ("ffn/gate_up", "ffn/down")), (heads, ("attn/qkv", "attn/out"))):
    want = function(*(whole[f"layers_0/{name}"] for name in names))
    got = sum(function(*(device(name, i) for name in names)) for i in range(size))
    np.testing.assert_allclose(got, want, atol=2e-5)


def test_what_does_not_divide_is_refused_before_a_file_is_read(tmp_path):
  source = ModelSource(str(GOLDENS / "llama"))
  with pytest.raises(ConfigError, match="engine.mesh.tensor=3 .*these sizes would do: 1, 2, 4"):
    Layout(weights.load_config(source), make_mesh(MeshConfig(3)))
  with pytest.raises(ConfigError, match="engine.mesh.tensor=3 .*these sizes would do"):
    weights.load_model(source, MeshConfig(3))


def test_a_model_on_a_mesh_is_not_saved(tmp_path):
  model = weights.load_model(SOURCES["hf"], MeshConfig(2))
  for save in (lambda: weights.save_orbax(str(tmp_path / "m"), model),
               lambda: weights.save_hf(str(tmp_path / "h"), model,
                                       weights.load_hf_config(SOURCES["hf"]))):
    with pytest.raises(ConfigError, match="laid out for engine.mesh.tensor=2, not 1.*on one device"):
      save()
  assert not (tmp_path / "m").exists()


@pytest.mark.parametrize("num_devices", [1, 2])
def test_shapes_are_known_before_the_parameters_are(num_devices):
  mesh = MeshConfig(num_devices)
  source = ModelSource(format="random", shape="tiny_qwen2", dtype="bfloat16")
  config, may_load = weights.load_config(source), threading.Event()
  model = weights.LoadingModel(config, lambda: weights.stored_shapes(config, mesh),
                       lambda: may_load.wait() and weights.load_model(source, mesh))
  shapes = model.shapes
  may_load.set()
  loaded = weights.load_model(source, mesh)
  assert jax.tree.leaves(shapes) == jax.tree.leaves(loaded.shapes)
  assert jax.tree.structure(shapes) == jax.tree.structure(model.params)
  jax.tree.map(np.testing.assert_array_equal, model.params, loaded.params)


def test_what_loading_raises_comes_with_the_parameters():
  def fail():
    raise weights.WeightError("a tensor is missing")

  model = weights.LoadingModel(models.SHAPES["tiny_llama"], lambda: {}, fail)
  assert model.shapes == {}
  with pytest.raises(weights.WeightError, match="missing"):
    _ = model.params
