"""A job on the fake model, slowed down so that a kill can hit every phase of it."""

import json
import os
import pathlib
import random
import time

from batchjax.config import EngineConfig, JobConfig, ModelSource
from batchjax.io import files, output
from batchjax.jobs.loaders import Loaders
from batchjax.jobs.run import run
from batchjax.testing.fake_model import FakeModel, fake_config
from batchjax.testing.fake_tokenizer import FakeTokenizer
from batchjax.types import SamplingParams
from batchjax.weights import Model

NUM_ROWS = 60
NUM_BAD = 6
_SHAPE = fake_config(max_len=128, eos=(0,))
_SHARED = ("Answer in one short sentence, and then say why. ", "Translate into French: ", "")


def write_input(path: pathlib.Path, seed: int, scores: bool = False) -> None:
  """Requests of both forms that share prefixes, with samples and stop strings, and bad rows; or rows to
  score."""
  rng = random.Random(seed)
  lines = []
  if scores:
    for i in range(NUM_ROWS):
      prompt = rng.choice(_SHARED) + f"item {rng.randrange(20)} "
      choices = ["" if i % 10 == 4 else str(rng.randrange(1000)) for _ in range(rng.choice((1, 2, 5)))]
      lines.append(json.dumps({"id": f"r{i}", "prompt": prompt, "continuations": choices}))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return
  for i in range(NUM_ROWS):
    fields = {"prompt": rng.choice(_SHARED) + f"item {rng.randrange(20)}",
              "max_tokens": rng.randrange(1, 40), "n": rng.choice((1, 3)),
              "temperature": rng.choice((0, 0.9)), "logprobs": None}
    if i % 3 == 0:
      fields["stop"] = rng.choice((["e", "th"], ["Q:"], [" a", "x", "}"]))
    if i % 10 == 4:
      fields["max_tokens"] = -1
    lines.append(json.dumps(fields | {"id": f"r{i}"} if i % 2 else {
        "custom_id": f"r{i}", "method": "POST", "url": "/v1/completions", "body": fields}))
  path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def config(cache_dir: str = "", **engine) -> JobConfig:
  """A small engine, in which rows wait for a slot and for pages."""
  values = dict(max_rows=8, max_step_tokens=64, page_size=4, num_pages=120, max_decode_steps=4,
                max_buckets=1, max_levels=2, compilation_cache_dir=cache_dir)
  return JobConfig(model=ModelSource(path=os.devnull), engine=EngineConfig(**values | engine),
                   sampling=SamplingParams(max_tokens=16))


def fake_loaders(tokenizer=FakeTokenizer, model_fn=None) -> Loaders:
  """Loads the fake model, whose end token is 0."""
  return Loaders(config=lambda source: _SHAPE, tokenizer=lambda source: tokenizer(),
                        model=model_fn or (lambda source, mesh: Model(_SHAPE, {})), shapes=lambda config, mesh: {},
                        module_class=FakeModel)


PHASES = ("starting", "compiling", "running", "finishing")


def run_slowly(directory: str, cache_dir: str, scores: bool, phases) -> None:
  """Runs `in.jsonl` of the directory to its end and tells when it enters each of `PHASES`.

  It waits a little with each row, and after each file that it puts in place.

  Args:
    directory: of the input; everything else is written there too.
    cache_dir: for compiled steps.
    scores: the rows are to score.
    phases: the sending end of a pipe.
  """
  sent = set()

  def enter(phase):
    if phase not in sent:
      sent.add(phase)
      phases.send(phase)

  class SlowTokenizer(FakeTokenizer):

    def encode_batch(self, texts, add_special_tokens=True):
      time.sleep(0.1)
      return super().encode_batch(texts)

  def format_slowly(*args, **kwargs):
    enter("running")
    time.sleep(0.01)
    return format_answer(*args, **kwargs)

  def sync_and_wait(path):
    sync_directory(path)
    if path == folder:
      enter("finishing")
    time.sleep(0.1)

  def load_model(source, mesh):
    enter("compiling")
    return Model(_SHAPE, {})

  folder = pathlib.Path(directory)
  sync_directory, files.sync_directory = files.sync_directory, sync_and_wait
  format_answer, output.format_answer = output.format_answer, format_slowly
  enter("starting")
  run(config(cache_dir), str(folder / "in.jsonl"), str(folder / "out.jsonl"), quiet=True,
      loaders=fake_loaders(SlowTokenizer, load_model), scores=scores)
