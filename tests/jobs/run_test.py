"""A whole job: what identifies it, how it is stopped and goes on, what it records."""

import dataclasses
import functools
import gc
import json
import os
import signal
import time

import pytest

from batchjax import report
from batchjax.config import ConfigError, EngineConfig, JobConfig, MeshConfig, ModelSource
from batchjax.jobs.identity import identity
from batchjax.jobs.job import JobMismatch
from batchjax.jobs.loaders import configure_jax, Loaders, read_tokenizer
from batchjax.jobs.run import default_error_path, run
from batchjax.jobs.signals import Interrupted, stop_on_signal
from batchjax.testing.fake_model import FakeModel, fake_config
from batchjax.testing.fake_tokenizer import FakeTokenizer
from batchjax.types import SamplingParams
from batchjax.weights import Model

SHAPE = fake_config(max_len=96, eos=(0,))
ROWS = [{"id": f"r{i}", "prompt": ("Tell me about it: " if i % 3 else "") + f"number {i % 5}",
         "n": 1 + i % 2, "max_tokens": 3 + i} for i in range(14)] + [{"id": "bad"}]
NUM_GOOD = len(ROWS) - 1


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
  """Compiled steps of this module."""
  return str(tmp_path_factory.mktemp("cache"))


def make_config(cache, **engine):
  values = dict(max_rows=4, max_step_tokens=32, page_size=4, num_pages=100, max_decode_steps=2,
                max_levels=1, max_buckets=1, compilation_cache_dir=cache)
  return JobConfig(model=ModelSource(path=os.devnull), engine=EngineConfig(**values | engine),
                   sampling=SamplingParams(temperature=0.0))


def run_job(folder, config, tokenizer=FakeTokenizer, model_fn=lambda source, mesh: Model(SHAPE, {}),
            module_class=FakeModel):
  if not (folder / "in.jsonl").exists():
    (folder / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
  return run(config, str(folder / "in.jsonl"), str(folder / "out.jsonl"), quiet=True,
             loaders=Loaders(lambda source: SHAPE, lambda source: tokenizer(), model_fn,
                             module_class, lambda config, mesh: {}))


def read(path):
  return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, cache):
  folder = tmp_path_factory.mktemp("undisturbed")
  finished = run_job(folder, make_config(cache))
  assert (finished.num_outputs, finished.num_errors, finished.was_finished) == (NUM_GOOD, 1, False)
  return folder


@pytest.fixture
def sigterm():
  """Numbers of the SIGTERMs that reach the handler from before the job."""
  received = []
  previous = signal.signal(signal.SIGTERM, lambda number, frame: received.append(number))
  yield received
  signal.signal(signal.SIGTERM, previous)


class StoppingTokenizer(FakeTokenizer):
  """Asks the process to stop when the text of its third sample is made."""

  num_signals = 1

  def __init__(self):
    self.num_decoded = 0

  def text_pieces(self, token_ids, echoed=()):
    self.num_decoded += 1
    if self.num_decoded == 3:
      for _ in range(self.num_signals):
        os.kill(os.getpid(), signal.SIGTERM)
    return super().text_pieces(token_ids, echoed)


def test_a_signal_keeps_the_step_and_the_job_goes_on(tmp_path, cache, undisturbed, sigterm):
  handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
  with pytest.raises(Interrupted):
    run_job(tmp_path, make_config(cache), StoppingTokenizer)
  assert sigterm == []
  assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == handlers
  kept = read(tmp_path / "out.jsonl.job/journal.jsonl")
  assert 1 + 1 < len(kept) < len(ROWS)  # the error row, and the row during which the signal came
  assert not (tmp_path / "out.jsonl").exists()

  assert run_job(tmp_path, make_config(cache)).num_outputs == NUM_GOOD
  for name in ("out.jsonl", "out.errors.jsonl"):
    assert (tmp_path / name).read_bytes() == (undisturbed / name).read_bytes()
  first, second = report.read_runs(tmp_path / "out.jsonl.job" / report.METRICS_FILE)
  assert first.record.num_requests == len(ROWS)
  assert second.record.num_requests == len(ROWS) - len(kept)
  assert (first.record.num_done, second.record.num_done) == (0, len(kept))


def test_a_job_begun_on_a_mesh_goes_on_on_another(tmp_path, cache, undisturbed, sigterm):
  with pytest.raises(Interrupted):
    run_job(tmp_path, make_config(cache, mesh=MeshConfig(4)), StoppingTokenizer)
  assert run_job(tmp_path, make_config(cache, mesh=MeshConfig(2))).num_outputs == NUM_GOOD
  assert (tmp_path / "out.jsonl").read_bytes() == (undisturbed / "out.jsonl").read_bytes()
  runs = report.read_runs(tmp_path / "out.jsonl.job" / report.METRICS_FILE)
  assert [run.record.num_devices for run in runs] == [4, 2]


def test_a_second_signal_acts_as_without_a_job(tmp_path, cache, sigterm):
  class ImpatientTokenizer(StoppingTokenizer):
    num_signals = 2

  with pytest.raises(Interrupted):
    run_job(tmp_path, make_config(cache), ImpatientTokenizer)
  assert sigterm == [signal.SIGTERM]


def test_a_signal_inside_the_garbage_collector_is_not_lost(capfd, sigterm):
  sent = []

  def collect(phase, info):
    if not sent:
      sent.append(phase)
      os.kill(os.getpid(), signal.SIGTERM)

  gc.callbacks.append(collect)
  try:
    with pytest.raises(Interrupted):
      with stop_on_signal():
        gc.collect()
        time.sleep(60)
  finally:
    gc.callbacks.remove(collect)
  assert sigterm == [] and "Interrupted" not in capfd.readouterr().err


def test_a_signal_before_the_first_step_stops_at_once(tmp_path, cache, sigterm):
  class StopsWhilePreparing(FakeTokenizer):

    def encode_batch(self, texts, add_special_tokens=True):
      os.kill(os.getpid(), signal.SIGTERM)
      raise AssertionError("went on")

  with pytest.raises(Interrupted):
    run_job(tmp_path, make_config(cache), StopsWhilePreparing)
  assert not (tmp_path / "out.jsonl.job/prepared.json").exists()
  assert issubclass(Interrupted, KeyboardInterrupt)  # no library swallows it


def test_rows_are_prepared_once_and_a_finished_job_loads_nothing(tmp_path, cache, undisturbed):
  class Unreadable(FakeTokenizer):

    def encode_batch(self, texts, add_special_tokens=True):
      raise AssertionError("tokenized again")

  def broken(source, mesh):
    raise OSError("disk of the weights is away")

  with pytest.raises(OSError, match="weights"):
    run_job(tmp_path, make_config(cache), model_fn=broken)
  assert run_job(tmp_path, make_config(cache), Unreadable).num_outputs == NUM_GOOD
  again = run_job(tmp_path, make_config(cache), Unreadable, broken)
  assert again.was_finished and again.num_outputs == NUM_GOOD
  assert (tmp_path / "out.jsonl").read_bytes() == (undisturbed / "out.jsonl").read_bytes()


def test_a_killed_job_that_lacks_only_its_files_writes_them(undisturbed, cache):
  expected = (undisturbed / "out.jsonl").read_bytes()
  (undisturbed / "out.jsonl").unlink()
  finished = run_job(undisturbed, make_config(cache),
                 model_fn=lambda source, mesh: pytest.fail("the model was loaded"))
  assert not finished.was_finished and (undisturbed / "out.jsonl").read_bytes() == expected


def test_texts_depend_on_no_engine_setting(tmp_path, undisturbed):
  """Nor does anything else but the cached tokens, which sharing and windows decide."""
  run_job(tmp_path, make_config("", share_prefixes=False, plan_window=5, page_size=8, max_rows=3,
                            max_step_tokens=16, lookahead=0, max_decode_steps=3, num_pages=60))
  for ours, expected in zip(read(tmp_path / "out.jsonl"), read(undisturbed / "out.jsonl"),
                            strict=True):
    assert ours["usage"].pop("prompt_tokens_details") == {"cached_tokens": 0}
    del expected["usage"]["prompt_tokens_details"]
    assert ours == expected


def test_rows_for_which_the_model_gives_nan_are_error_rows(tmp_path, undisturbed):
  (tmp_path / "in.jsonl").write_text("\n" + (undisturbed / "in.jsonl").read_text())
  finished = run_job(tmp_path, make_config(""), module_class=functools.partial(FakeModel, nan_every=30))
  errors = [e for e in read(tmp_path / "out.errors.jsonl") if e["error"]["code"] == "model_error"]
  assert 0 < len(errors) < NUM_GOOD and finished.num_outputs == NUM_GOOD - len(errors)
  for error in errors:
    assert "gives logits that are NaN or infinite: check its weights" in error["error"]["message"]
    assert error["error"]["row"] == int(error["custom_id"][1:]) + 2  # behind a blank line
  wrong = {error["custom_id"] for error in errors}
  same = [row for row in read(undisturbed / "out.jsonl") if row["id"] not in wrong]
  assert [row["text"] for row in read(tmp_path / "out.jsonl") if "text" in row] == [
      row["text"] for row in same if "text" in row]
  runs = report.read_runs(tmp_path / "out.jsonl.job" / report.METRICS_FILE)
  assert {r.request_id for r in runs[0].requests if r.finish_reason == "error"} == wrong | {"bad"}


def test_changed_input_and_settings_are_refused(undisturbed, cache, tmp_path):
  config = make_config(cache)
  with pytest.raises(JobMismatch, match="sampling.temperature: 0.0 -> 0.5"):
    run_job(undisturbed, dataclasses.replace(config, sampling=SamplingParams(temperature=0.5)))
  with pytest.raises(JobMismatch, match="engine.max_levels: 1 -> 2"):
    run_job(undisturbed, make_config(cache, max_levels=2))  # cached tokens would change
  text = (undisturbed / "in.jsonl").read_text()
  (undisturbed / "in.jsonl").write_text(text + '{"prompt": "one more"}\n')
  with pytest.raises(JobMismatch, match="input: "):
    run_job(undisturbed, config)
  (undisturbed / "in.jsonl").write_text(text)
  assert run_job(undisturbed, make_config(cache, max_rows=2, num_pages=80)).was_finished


def test_identity_hashes_every_file_of_the_model(tmp_path):
  (tmp_path / "model/sub").mkdir(parents=True)
  (tmp_path / "in.jsonl").write_text("{}")
  config = JobConfig(model=ModelSource(path=str(tmp_path / "model")))
  seen = []
  for name, text in (("model/a", "1"), ("model/sub/b", "1"), ("model/a", "2")):
    (tmp_path / name).write_text(text)
    seen.append(identity(config, str(tmp_path / "in.jsonl")))
  assert list(seen[1]["model"]["files"]) == ["model/a", "model/sub/b"]
  split = dataclasses.replace(config, model=dataclasses.replace(
      config.model, split_special_tokens=True))
  seen.append(identity(split, str(tmp_path / "in.jsonl")))
  assert seen[0] != seen[1] != seen[2] != seen[3]
  json.dumps(seen)


@pytest.mark.parametrize("output, error", [
    ("d/out.jsonl", "d/out.errors.jsonl"), ("a.b.jsonl.gz", "a.b.errors.jsonl.gz"),
    ("v1.2.parquet", "v1.2.errors.parquet")])
def test_default_error_path(output, error):
  assert default_error_path(output) == error


def test_a_tokenizer_that_cannot_be_read_names_the_field(tmp_path):
  with pytest.raises(ConfigError, match="model.tokenizer is empty"):
    read_tokenizer(ModelSource(format="random", shape="x"))
  (tmp_path / "t.txt").write_text("")
  with pytest.raises(ConfigError, match="model.tokenizer: .*t.txt is no known kind of tokenizer"):
    read_tokenizer(ModelSource(path="m", tokenizer=str(tmp_path / "t.txt")))


def test_no_device_names_the_setting(monkeypatch):
  def fail():
    raise RuntimeError("Unable to initialize backend 'cuda'")

  monkeypatch.setattr("jax.devices", fail)
  with pytest.raises(ConfigError, match="no device .*'cuda'.*: set JAX_PLATFORMS"):
    configure_jax()


def test_metrics_tell_of_every_request(undisturbed):
  runs = report.read_runs(undisturbed / "out.jsonl.job" / report.METRICS_FILE)
  requests = {record.request_id: record for record in runs[0].requests}
  assert len(requests) == NUM_GOOD + 1
  assert requests["bad"].finish_reason == "error"
  for row in read(undisturbed / "out.jsonl"):
    record = requests[row["id"]]
    assert record.generated_tokens == row["usage"]["completion_tokens"]
    assert record.prompt_tokens == row["usage"]["prompt_tokens"]
    assert 0 <= record.start_secs <= record.end_secs
  assert runs[0].steps[-1].finished == len(ROWS)
  assert sum(step.generated_tokens for step in runs[0].steps) >= sum(
      record.generated_tokens for record in requests.values())
  assert json.loads((undisturbed / "out.jsonl.job" / report.PLAN_FILE).read_text())["nodes"]
