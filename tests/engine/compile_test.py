"""What the compiled steps hold: the pool once, updated in place."""

import dataclasses
import functools
import re

import jax
import numpy as np
import pytest

from batchjax.cache.kv_state import init_kv_state
from batchjax.config import ConfigError, EngineConfig, MeshConfig
from batchjax.engine import compile as compile_lib
from batchjax.engine import startup
from batchjax.engine.sampling_inputs import SamplingFeatures, SamplingTable
from batchjax.models import SHAPES, Transformer
from batchjax.plan.buckets import Bucket
from batchjax.testing.fake_model import FakeModel, fake_config
from batchjax.sharding import Split
from batchjax.testing.on_mesh import on_mesh
from batchjax.types import SamplingParams
from batchjax.weights import Model
from batchjax.weights.random import random_params

NUM_PAGES, PAGE_SIZE, MAX_ROWS = 3000, 4, 4
ENGINE = EngineConfig(page_size=PAGE_SIZE, num_pages=NUM_PAGES, max_rows=MAX_ROWS,
                      max_decode_steps=3, compilation_cache_dir="")
MIXED = Bucket("mixed", 8, MAX_ROWS, 6, 16)
DECODE = Bucket("decode", MAX_ROWS, MAX_ROWS, 6, 16)


@functools.cache
def tiny_model() -> Model:
  config = SHAPES["tiny_llama"]
  return Model(config, random_params(config, seed=0))


def compiled(model, module_class, buckets, features=SamplingFeatures(), mesh=MeshConfig()):
  engine = dataclasses.replace(ENGINE, mesh=mesh)
  state = compile_lib.make_state_fn(model.config, engine, NUM_PAGES, MAX_ROWS, features)()
  module = module_class(model.config.of_device(mesh.tensor), PAGE_SIZE,
                        split=Split.of(mesh, model.config))
  compiler = compile_lib.StepCompiler(module, on_mesh(model, mesh).params, features, None,
                                      model.config, engine, jax.devices()[0])
  return compiler.compile(state, buckets), state


@pytest.mark.parametrize("size", [1, 4])
@pytest.mark.parametrize("bucket", [MIXED, DECODE], ids=lambda bucket: bucket.kind)
def test_the_pool_is_updated_in_place(bucket, size):
  model = tiny_model()
  steps, state = compiled(model, Transformer, [bucket], mesh=MeshConfig(size))
  executable = steps[bucket]
  pool_bytes = sum(pages.nbytes for pages in state.kv.pages) // size  # of each device
  assert pool_bytes == (NUM_PAGES * PAGE_SIZE
                        * model.config.of_device(size).kv_bytes_per_token(1))
  memory = executable.memory_analysis()
  assert memory.alias_size_in_bytes >= pool_bytes
  assert memory.temp_size_in_bytes < pool_bytes // model.config.num_layers
  hlo = executable.as_text()
  shape = ",".join(map(str, state.kv.pages[0].addressable_shards[0].data.shape))
  assert re.search(rf"f32\[{shape}\]", hlo), "the pattern below would find nothing"
  assert not re.search(rf"= f32\[{shape}\]\S* copy\(", hlo)
  num_aliases = len(re.findall(r"\((\d+), {}, (?:may|must)-alias\)", hlo))
  assert num_aliases == len(jax.tree.leaves(state)), "a part of the state is not donated"


def test_an_unknown_shape_is_an_error_that_names_it():
  steps, _ = compiled(Model(fake_config(), {}), FakeModel, [MIXED])
  with pytest.raises(compile_lib.ShapeError, match="num_tokens=9.*num_tokens=8"):
    steps[MIXED._replace(num_tokens=9)]
  with pytest.raises(compile_lib.ShapeError, match="admit"):
    steps["admit"]


def test_each_shape_is_recorded_with_its_seconds():
  steps, _ = compiled(Model(fake_config(), {}), FakeModel, [MIXED, DECODE],
                      SamplingFeatures.of([SamplingParams(presence_penalty=1.0)], ()))
  assert [record.name for record in steps.records] == ["mixed 8", "decode 4", "admit"]
  assert all(record.secs > 0 for record in steps.records)


def test_state_begins_empty():
  config = fake_config()
  state = compile_lib.make_state_fn(config, ENGINE, 7, 3, SamplingFeatures())()
  want = init_kv_state(config, 7, PAGE_SIZE)
  assert [pages.shape for pages in state.kv.pages] == [pages.shape for pages in want.pages]
  assert state.done.all() and len(state.done) == 3 and state.penalties is None


def test_a_step_too_large_for_the_device_is_an_error_with_its_numbers():
  steps, state = compiled(tiny_model(), Transformer, [MIXED])
  record, = steps.records
  pool_bytes = sum(pages.nbytes for pages in state.kv.pages)
  assert record.argument_bytes > pool_bytes and record.temp_bytes > 0
  needed = record.argument_bytes + record.temp_bytes
  startup.check_memory(steps.records, needed)
  startup.check_memory(steps.records, None)
  with pytest.raises(ConfigError, match="'mixed 8' needs .* GiB more than.*engine.kv_memory_bytes"):
    startup.check_memory(steps.records, needed - 1)


def test_warming_up_changes_nothing(monkeypatch):
  steps, state = compiled(Model(fake_config(), {}), FakeModel, [MIXED, DECODE])
  before = jax.tree.map(np.array, state)
  monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
  table = SamplingTable(MAX_ROWS, SamplingFeatures(), ())
  after, _ = startup.warm_up(steps, [MIXED, DECODE], {}, None, state, table, PAGE_SIZE,
                          SamplingFeatures())
  jax.tree.map(np.testing.assert_array_equal, jax.tree.map(np.array, after), before)
