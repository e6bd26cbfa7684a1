"""Where model and tokenizer meet: the tokens that end a sample."""

import dataclasses
import json
import os

from absl import logging
import pytest

from batchjax.config import EngineConfig, JobConfig, ModelSource
from batchjax.jobs.loaders import Loaders
from batchjax.jobs.plan import plan_file
from batchjax.jobs.run import run
from batchjax.plan.cost import CHIPS
from batchjax.testing.fake_model import FakeModel, fake_config
from batchjax.testing.fake_tokenizer import FakeTokenizer
from batchjax.types import SamplingParams
from batchjax.weights import Model

SHAPE = fake_config(max_len=96, eos=(0,))
SOURCE = ModelSource(path=os.devnull)


class Tokenizer(FakeTokenizer):
  eos_token_ids = (30, 0, 5000)  # the last one is of another model


LOADERS = Loaders(lambda source: SHAPE, lambda source: Tokenizer(),
                  lambda source, mesh: Model(SHAPE, {}), FakeModel, lambda config, mesh: {})


@pytest.fixture
def logged(monkeypatch):
  lines = []
  monkeypatch.setattr(logging, "info", lambda text, *args: lines.append(text % args))
  return lines


def test_end_tokens_of_both_end_a_sample(logged):
  config, _ = LOADERS.read(SOURCE)
  assert config == dataclasses.replace(SHAPE, eos_token_ids=(0, 30))
  assert LOADERS.load(SOURCE, config).config == config
  assert logged == ["end tokens: 0 '<end>' (model, tokenizer), 30 '=' (tokenizer)"]


def test_a_model_without_end_tokens_is_said_to_have_none(logged):
  loaders = dataclasses.replace(LOADERS, config=lambda source: fake_config(max_len=8),
                                tokenizer=lambda source: FakeTokenizer())
  assert loaders.read(SOURCE)[0].eos_token_ids == ()
  assert logged == ["end tokens: none, samples end by length or stop string"]


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
  """Rows of a job, each with and without its end tokens, and their samples by id."""
  folder = tmp_path_factory.mktemp("job")
  lines = [{"id": f"{i}{'!' * ignore}", "prompt": f"number {i}", "seed": i, "ignore_eos": ignore}
           for i in range(12) for ignore in (False, True)]
  (folder / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
  config = JobConfig(
      SOURCE, EngineConfig(max_rows=8, max_step_tokens=64, page_size=4, num_pages=200,
                           compilation_cache_dir=""), SamplingParams(max_tokens=40))
  run(config, str(folder / "in.jsonl"), str(folder / "out.jsonl"), quiet=True, loaders=LOADERS)
  return {row["id"]: row for row in map(json.loads, (folder / "out.jsonl").open())}


def test_a_job_ends_samples_at_the_tokenizers_tokens(rows):
  ended = 0
  for i in range(12):
    row, whole = rows[f"{i}"], rows[f"{i}!"]["text"]
    assert rows[f"{i}!"]["finish_reason"] == "length"
    assert "=" not in row["text"] and whole.startswith(row["text"])
    ended += row["finish_reason"] == "stop" and whole[len(row["text"]):].startswith("=")
  assert ended >= 3


def test_each_job_names_them_once(tmp_path, logged):
  (tmp_path / "in.jsonl").write_text('{"id": "a", "prompt": "x"}\n')
  config = JobConfig(SOURCE, EngineConfig(compilation_cache_dir=""))
  plan_file(config, str(tmp_path / "in.jsonl"), tmp_path, CHIPS["cpu"], LOADERS)
  assert len(logged) == 1
  (tmp_path / "pairs.jsonl").write_text('{"prompt": "x", "continuation": 3}\n')
  run(config, str(tmp_path / "pairs.jsonl"), str(tmp_path / "o.jsonl"), loaders=LOADERS, scores=True)
  assert len(logged) == 2
