"""Compiled steps outlive a job: in the process, and on disk for other processes."""

import dataclasses
import logging
import os
import subprocess
import sys

import jax
import numpy as np
import pytest

from batchjax.config import ConfigError, EngineConfig, MeshConfig
from batchjax.engine import step_cache
from batchjax.engine.compile import CompileRecord
from batchjax.engine.sampling_inputs import SamplingFeatures
from batchjax.generation import generate
from batchjax.plan.buckets import Bucket
from batchjax.testing.fake_model import fake_config, FakeModel
from batchjax.types import Request, SamplingParams
from batchjax.weights import Model

MODEL = Model(fake_config(max_len=256), {})
SIZES = dict(page_size=4, num_pages=300, max_rows=16, max_step_tokens=256)
KEY = step_cache.StepKey("b" * 32, Bucket("mixed", 64, 8, 16, 100), 8, 100)


@pytest.fixture(autouse=True)
def forget():
  """Each test begins as a new process does."""
  step_cache.compiled_steps().clear()
  yield
  step_cache.compiled_steps().clear()


@pytest.fixture
def engine(tmp_path):
  return EngineConfig(compilation_cache_dir=str(tmp_path / "cache"), **SIZES)


def requests(seed, num=12, max_tokens=6, **params):
  rng = np.random.default_rng(seed)
  return [Request(f"r{i}", rng.integers(0, 97, rng.integers(10, 20)).astype(np.int32),
                  SamplingParams(max_tokens=max_tokens + i % 3, **params)) for i in range(num)]


def run(engine, seed=0, **params):
  """Tokens of a job, and the records of its steps."""
  records = []
  observe = lambda event: records.append(event) if isinstance(event, CompileRecord) else None
  tokens = {c.request_id: c.choices[0].token_ids.tolist()
            for c in generate(MODEL, requests(seed, **params), engine, observe=observe,
                              module_class=FakeModel)}
  return tokens, records


def small_step():
  compiled = jax.jit(lambda x: x + 1).lower(jax.ShapeDtypeStruct((8,), np.float32)).compile()
  return step_cache.CompiledStep(compiled, 1, 2)


def entries(engine):
  return sorted(os.path.join(engine.compilation_cache_dir, name)
                for name in os.listdir(engine.compilation_cache_dir))


def test_ten_like_jobs_compile_once(engine):
  compiles = []
  listen = lambda event, secs, **_: compiles.append(event) if "backend_compile" in event else None
  jax.monitoring.register_event_duration_secs_listener(listen)
  try:
    run(engine)
    first = len(compiles)
    for seed in range(1, 10):
      _, records = run(engine, seed, num=12 + seed % 3, max_tokens=6 + seed % 4)
      assert all(record.cached for record in records)
  finally:
    jax.monitoring.unregister_event_duration_listener(listen)
  assert first and len(compiles) == first


def test_a_new_process_reads_what_another_left(engine):
  program = f"""
import jax, sys
sys.path[:0] = {[os.path.dirname(__file__), *sys.path]!r}
import step_cache_test as t
engine = t.EngineConfig(compilation_cache_dir={engine.compilation_cache_dir!r}, **t.SIZES)
tokens, records = t.run(engine)
print([record.cached for record in records], sorted(tokens.items()))
"""
  first, second = (subprocess.run([sys.executable, "-c", program], capture_output=True, text=True,
                                  check=True).stdout for _ in range(2))
  assert first.startswith("[False, False]") and second.startswith("[True, True]")
  assert first.split("] ", 1)[1] == second.split("] ", 1)[1]


def test_a_step_from_disk_gives_the_same_and_updates_its_state_in_place(engine):
  tokens, records = run(engine)
  step_cache.compiled_steps().clear()
  again, read = run(engine)
  assert again == tokens
  assert all(not old.cached and new.cached and new.read_secs > 0
             for old, new in zip(records, read, strict=True))
  assert ([(r.argument_bytes, r.temp_bytes) for r in read]
          == [(r.argument_bytes, r.temp_bytes) for r in records])
  for key in step_cache.compiled_steps().keys():
    aliases = step_cache.compiled_steps().get(key).executable.memory_analysis().alias_size_in_bytes
    assert aliases >= 300 * 4 * 2 * 4, "the pool is donated"


def test_steps_on_a_mesh_are_kept_and_are_not_those_of_one_device(engine):
  on_two = dataclasses.replace(engine, mesh=MeshConfig(2))
  want, _ = run(engine)
  tokens, records = run(on_two)
  assert tokens == want and not any(record.cached for record in records)
  step_cache.compiled_steps().clear()
  again, read = run(on_two)
  assert again == tokens and all(record.cached for record in read)
  for key in step_cache.compiled_steps().keys():
    aliases = step_cache.compiled_steps().get(key).executable.memory_analysis().alias_size_in_bytes
    assert aliases >= 300 * 4 * 2 * 4, "the pool is donated"


@pytest.mark.parametrize("damage", [
    lambda content: content[:len(content) // 2], lambda content: b"", lambda content: b"\n",
    lambda content: content[:-1] + bytes([content[-1] ^ 1]),
    lambda content: content.replace(b'"key": "', b'"key": "x', 1),
    lambda content: b"{}" + content[content.index(b"\n"):], lambda content: b"\xff" * 100])
def test_an_entry_that_is_damaged_is_none_and_a_line_in_the_log(tmp_path, damage, caplog):
  folder = step_cache.StepFolder(str(tmp_path), 1 << 40)
  folder.put(KEY, small_step())
  assert folder.get(KEY, jax.devices()[:1]).temp_bytes == 2
  path, = tmp_path.iterdir()
  path.write_bytes(damage(path.read_bytes()))
  with caplog.at_level(logging.WARNING):
    assert folder.get(KEY, jax.devices()[:1]) is None
  assert [str(path) in record.getMessage() for record in caplog.records] == [True]


def test_a_damaged_entry_means_compiling_and_is_mended(engine):
  tokens, _ = run(engine)
  for path in entries(engine):
    os.truncate(path, 1000)
  step_cache.compiled_steps().clear()
  again, records = run(engine)
  assert again == tokens and not any(record.cached for record in records)
  step_cache.compiled_steps().clear()
  assert all(record.cached for record in run(engine)[1])


def test_what_the_program_depends_on_is_in_its_key(monkeypatch):
  device = jax.devices()[0]
  key = lambda **parts: step_cache.base_key(FakeModel(MODEL.config, 4), device, **parts)
  base = key(features=SamplingFeatures())
  platforms = jax.config.jax_platforms
  try:  # where the device was named, and where it was found
    jax.config.update("jax_platforms", None)
    assert base == key(features=SamplingFeatures())
  finally:
    jax.config.update("jax_platforms", platforms)
  others = [key(features=SamplingFeatures(top_p=True)),
            step_cache.base_key(FakeModel(MODEL.config, 8), device, features=SamplingFeatures())]
  with jax.default_matmul_precision("highest"):
    others.append(key(features=SamplingFeatures()))
  monkeypatch.setenv("XLA_FLAGS", os.environ.get("XLA_FLAGS", "") + " --xla_cpu_enable_fast_math=true")
  others.append(key(features=SamplingFeatures()))
  monkeypatch.setattr(jax, "__version__", "0.0.1")
  others.append(key(features=SamplingFeatures()))
  monkeypatch.setattr(step_cache, "_sources", lambda *paths: "other program text")
  others.append(key(features=SamplingFeatures()))
  assert len({base, *others}) == 1 + len(others)


def test_keys_are_file_names_and_back():
  assert step_cache.StepKey.parse(str(KEY)) == KEY
  for text in ("", "x", "a.mixed.1.2.3.4.5", "a.mixed.1.2.3.4.5.x", "a.b.c.d.e.f.g.h"):
    assert step_cache.StepKey.parse(text) is None


@pytest.mark.parametrize("mode", [0o770, 0o707, 0o722])
def test_a_folder_that_others_may_write_to_is_refused(tmp_path, mode):
  tmp_path.chmod(mode)
  with pytest.raises(ConfigError, match="engine.compilation_cache_dir.*chmod go-w"):
    step_cache.StepFolder(str(tmp_path), 1 << 20)


def test_a_folder_of_somebody_else_is_refused(tmp_path, monkeypatch):
  monkeypatch.setattr(os, "getuid", lambda: tmp_path.stat().st_uid + 1)
  with pytest.raises(ConfigError, match="engine.compilation_cache_dir"):
    step_cache.StepFolder(str(tmp_path), 1 << 20)


def test_a_folder_that_cannot_be_made_is_an_error_that_names_the_setting(tmp_path):
  (tmp_path / "file").write_text("")
  with pytest.raises(ConfigError, match="engine.compilation_cache_dir"):
    step_cache.StepFolder(str(tmp_path / "file"), 1 << 20)


def test_the_folder_is_its_owners_alone(tmp_path):
  step_cache.StepFolder(str(tmp_path / "a" / "b"), 1 << 20)
  assert (tmp_path / "a" / "b").stat().st_mode & 0o777 == 0o700


def test_entries_not_used_for_longest_go_when_there_are_too_many_bytes(tmp_path):
  step = small_step()
  keys = [KEY._replace(num_slots=i) for i in range(4)]
  folder = step_cache.StepFolder(str(tmp_path), 1 << 40)
  for i, key in enumerate(keys[:3]):
    folder.put(key, step)
    os.utime(tmp_path / f"{key}.step", (i, i))
  size = (tmp_path / f"{keys[0]}.step").stat().st_size
  assert folder.get(keys[0], jax.devices()[:1]) is not None, "and so was used last"
  step_cache.StepFolder(str(tmp_path), int(2.5 * size)).put(keys[3], step)
  assert set(folder.keys()) == {keys[0], keys[3]}


def test_a_folder_that_cannot_be_written_costs_the_entry_alone(tmp_path, monkeypatch, caplog):
  folder = step_cache.StepFolder(str(tmp_path), 1 << 40)
  folder.put(KEY, small_step())

  def full(*args, **kwargs):
    raise OSError(28, "No space left on device")

  monkeypatch.setattr("pathlib.Path.write_bytes", full)
  monkeypatch.setattr(os, "utime", full)
  with caplog.at_level(logging.WARNING):
    folder.put(KEY._replace(num_slots=9), small_step())
  assert "is not kept" in caplog.text and "No space left" in caplog.text
  assert folder.keys() == [KEY] and os.listdir(tmp_path) == [f"{KEY}.step"]
  assert folder.get(KEY, jax.devices()[:1]) is not None


def test_memory_keeps_the_latest():
  memory, step = step_cache.StepMemory(2), step_cache.CompiledStep(None, 0, 0)
  keys = [KEY._replace(num_slots=i) for i in range(3)]
  memory.put(keys[0], step)
  memory.put(keys[1], step)
  assert memory.get(keys[0]) is step
  memory.put(keys[2], step)
  assert memory.keys() == [keys[0], keys[2]] and memory.get(keys[1]) is None
  memory.clear()
  assert not memory.keys()


def test_no_folder_keeps_nothing_on_disk(engine, tmp_path):
  run(dataclasses.replace(engine, compilation_cache_dir=""))
  assert not list(tmp_path.iterdir())
