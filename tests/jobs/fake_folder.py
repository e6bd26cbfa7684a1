"""Whole jobs without an engine: the folder and all its files are real, completions are hashes."""

import contextlib
import functools
import hashlib
import importlib
import json
import logging
import os
import random
import runpy
import signal
import sys
from unittest import mock

import numpy as np

from batchjax.config import EngineConfig, JobConfig, ModelSource
from batchjax.jobs import plan as plan_lib
from batchjax.jobs import run as run_lib
from batchjax.jobs.loaders import Loaders
from batchjax.jobs.signals import Interrupted
from batchjax.testing.fake_model import fake_config
from batchjax.testing.fake_tokenizer import FakeTokenizer
from batchjax.types import Choice, Completion, SamplingParams
from batchjax.weights import Model

NUM_ROWS = 16
TASKS = ("complete", "score")
TASK = "complete"  # `of_task` changes it
SHAPE = fake_config(max_len=96, eos=(0,))


def of_task(name):
  """Within it, inputs and jobs of this module are of one of `TASKS`."""
  return mock.patch.object(sys.modules[__name__], "TASK", name)


def write_input(folder, seed):
  """Rows of both forms, every fifth bad; or rows to score."""
  rng = random.Random(seed)
  rows = [_row_to_score(i, rng) for i in range(NUM_ROWS)] if TASK == "score" else [{"id": f"r{i}", "prompt": f"number {rng.randrange(10**6)}",
           "max_tokens": -1 if i % 5 == 4 else rng.randrange(1, 9), "seed": i} for i in range(NUM_ROWS)]
  (folder / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def _row_to_score(i, rng):
  name, number = {"id": f"r{i}"}, str(rng.randrange(10**6))
  if i % 5 == 4:
    return name | {"prompt": "x", "continuation": ""}
  return name | ({"text": 10 * number}, {"prompt": "number", "continuation": number},
                 {"prompt": number, "continuations": ["a", " is one", number]})[i % 3]


class _NoRecorder:

  def __init__(self, *args):
    pass

  observe = finish = __init__


@contextlib.contextmanager
def _no_engine(stop_after=None):

  def generate(model, requests, engine, **_):
    model.params  # which loading it may have failed to bring
    for number, request in enumerate(requests):
      if number == stop_after:
        raise Interrupted
      yield complete(request)

  with (mock.patch.object(run_lib, "generate", generate), mock.patch("os.fsync"),
        mock.patch.object(run_lib, "Recorder", _NoRecorder)):
    yield


def complete(request):
  digest = hashlib.sha256(repr((request.prompt_token_ids.tolist(),
                                request.sampling_params)).encode()).digest()
  prompt_len = len(request.prompt_token_ids)
  if request.sampling_params.prompt_logprobs:
    scores = -np.resize(np.frombuffer(digest, np.uint8), prompt_len).astype(np.float32) / 7
    scores[:request.sampling_params.prompt_logprobs_start] = np.nan
    return Completion(request.request_id, (Choice(0, np.zeros(0, np.int32), "length"),), prompt_len, 0,
                      scores, request.prompt_token_ids[:, None] // 2 * 2, scores[:, None])
  tokens = np.frombuffer(digest, np.uint8)[:request.sampling_params.max_tokens] % 90
  return Completion(request.request_id, (Choice(0, tokens.astype(np.int32), "length"),),
                    prompt_len, 0)


def run(folder, stop_after=None, *, loaders=None, input_path=None, output="out.jsonl", model=os.devnull,
        **kwargs):
  """`jobs.run` of `in.jsonl`; Interrupted after so many rows."""
  config = JobConfig(model=ModelSource(path=model), sampling=SamplingParams(temperature=0.0),
                     engine=EngineConfig(num_pages=100, page_size=4, compilation_cache_dir=""))
  loaders = loaders or Loaders(lambda source: SHAPE, lambda source: FakeTokenizer(), load_model)
  with _no_engine(stop_after):
    return run_lib.run(config, str(input_path or folder / "in.jsonl"),
                       output if "://" in output else str(folder / output),
                       quiet=True, loaders=loaders, scores=TASK == "score", **kwargs)


CONFIG = '''
from batchjax.config import EngineConfig, JobConfig, ModelSource, to_config_dict
from batchjax.types import SamplingParams


def get_config():
  return to_config_dict(JobConfig(
      model=ModelSource(path="/dev/null"), sampling=SamplingParams(temperature=0.0),
      engine=EngineConfig(num_pages=100, page_size=4, compilation_cache_dir="")))
'''


def run_script(argv, streams, signal_at):
  """Runs a script in this process, which is a child's: the engine and the model are the fakes above.

  Args:
    argv: the script and its flags.
    streams: for descriptors 1 and 2 a path, "closed", or "broken" for a pipe that nobody reads.
    signal_at: "module.name" of a function before which SIGINT comes, or "".
  """
  for fd, name in enumerate(streams, start=1):
    if name == "broken":
      reader, writer = os.pipe()
      os.dup2(writer, fd)
      os.close(reader)
    elif name == "closed":
      os.close(fd)
    else:
      os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT), fd)
  sys.stdout, sys.stderr = (None if name == "closed" else open(fd, "w", encoding="utf-8")
                            for fd, name in enumerate(streams, start=1))
  logging.getLogger().handlers.clear()  # of the parent's streams
  if signal_at:
    module, _, name = signal_at.rpartition(".")
    owner = importlib.import_module(module)
    real, sent = getattr(owner, name), []

    def interrupted(*args, **kwargs):
      if not sent:
        sent.append(os.kill(os.getpid(), signal.SIGINT))
      return real(*args, **kwargs)

    setattr(owner, name, interrupted)
  fake = Loaders(lambda source: SHAPE, lambda source: FakeTokenizer(), load_model)
  run_lib.run = functools.partial(run_lib.run, loaders=fake)
  plan_lib.plan_file = functools.partial(plan_lib.plan_file, loaders=fake)
  sys.argv = argv
  with _no_engine():
    runpy.run_path(argv[0], run_name="__main__")


def load_model(source, mesh):
  return Model(SHAPE, {})
