"""Times batchjax against Hugging Face transformers on one workload, in one run, on the CPU.

    pip install torch transformers
    python scripts/compare.py --config=configs/smollm2_135m.py

64 requests share a prefix of random tokens, each with some of its own, greedy, a fixed
number of output tokens. Loading, compiling and warm-up are left out of both. Prints
seconds, the ratio, where batchjax's time went, and how many token ids agree.

Exit codes: 0 done, 2 refused or failed, with one line that says why, 130 interrupted.
"""

import signal

signal.signal(signal.SIGINT, signal.SIG_DFL)  # while modules load, Ctrl-C just ends the process

import json
import os
import pathlib
import tempfile
import time

from absl import flags
from ml_collections import config_flags
import numpy as np

import batchjax
from batchjax.config import ConfigError
from batchjax.generation import StepEvent
from batchjax.jobs import command_line
from batchjax.jobs.run import configure_jax
from batchjax.plan.planner import Plan
from batchjax.weights import load_hf_config, save_hf

_CONFIG = config_flags.DEFINE_config_file("config", None, "Configuration file.")
_ROWS = flags.DEFINE_integer("num_requests", 64, "Requests.")
_PREFIX = flags.DEFINE_integer("prefix_len", 512, "Shared prompt tokens.")
_OWN = flags.DEFINE_integer("own_len", 32, "Further prompt tokens of each request.")
_OUTPUT = flags.DEFINE_integer("output_len", 32, "Tokens to generate.")
_BATCH = flags.DEFINE_integer("peer_batch", 16, "Rows of a padded batch of transformers.")
_PEER = flags.DEFINE_bool("peer", True, "Time transformers too.")


def run_batchjax(model: batchjax.Model, prompts: np.ndarray, config: batchjax.JobConfig) -> dict:
  """Seconds from the first plan to the last completion, and the tokens."""
  params = batchjax.SamplingParams(temperature=0.0, max_tokens=_OUTPUT.value, ignore_eos=True)
  requests = [batchjax.Request(str(i), prompt, params) for i, prompt in enumerate(prompts)]
  begin, events = [], []

  def observe(event):
    if isinstance(event, Plan):
      begin.append(time.perf_counter())
    elif isinstance(event, StepEvent):
      events.append(event)

  tokens = {c.request_id: c.choices[0].token_ids.tolist()
            for c in batchjax.generate(model, requests, config.engine, observe=observe)}
  secs = time.perf_counter() - begin[0]
  by_kind = {kind: round(sum(e.step_secs for e in events if e.batch.kind == kind), 2)
             for kind in ("mixed", "decode")}
  host = sum(e.host_secs for e in events)
  return {"secs": round(secs, 2), "secs_by_kind": by_kind, "host_secs": round(host, 3),
          "prompt_tokens_computed": sum(e.batch.num_prompt_tokens for e in events),
          "tokens": [tokens[str(i)] for i in range(len(prompts))]}


def run_transformers(model: batchjax.Model, prompts: np.ndarray,
                     source: batchjax.ModelSource) -> dict:
  """The same through `generate` in padded batches."""
  try:
    import torch  # a peer, not a dependency
    import transformers
  except ImportError as e:
    raise ConfigError(f"{e}: pip install torch transformers, or set --nopeer") from e
  torch.set_num_threads(os.cpu_count())
  with tempfile.TemporaryDirectory() as folder:
    save_hf(pathlib.Path(folder), model, load_hf_config(source))
    peer = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
  peer.generation_config.eos_token_id = None  # as `ignore_eos`
  options = dict(max_new_tokens=_OUTPUT.value, do_sample=False, pad_token_id=0)
  peer.generate(torch.tensor(prompts[:1, :8], dtype=torch.long), **options)
  start, tokens = time.perf_counter(), []
  for first in range(0, len(prompts), _BATCH.value):
    batch = torch.tensor(prompts[first:first + _BATCH.value], dtype=torch.long)
    out = peer.generate(batch, attention_mask=torch.ones_like(batch), **options)
    tokens += out[:, batch.shape[1]:].tolist()
  return {"secs": round(time.perf_counter() - start, 2), "tokens": tokens}


def main() -> None:
  config = command_line.job_config(_CONFIG.value)
  configure_jax()
  model = batchjax.load_model(config.model)
  rng = np.random.default_rng(0)
  draw = lambda *shape: rng.integers(3, model.config.vocab_size, shape).astype(np.int32)
  prefix = np.tile(draw(1, _PREFIX.value), (_ROWS.value, 1))
  prompts = np.concatenate([prefix, draw(_ROWS.value, _OWN.value)], axis=1)
  result = {"batchjax": run_batchjax(model, prompts, config)}
  if _PEER.value:
    result["transformers"] = run_transformers(model, prompts, config.model)
    mine, theirs = (result[name]["tokens"] for name in ("batchjax", "transformers"))
    result["ratio"] = round(result["transformers"]["secs"] / result["batchjax"]["secs"], 2)
    result["requests_with_equal_tokens"] = sum(a == b for a, b in zip(mine, theirs))
  for entry in result.values():
    if isinstance(entry, dict):
      del entry["tokens"]
  print(json.dumps(result))


if __name__ == "__main__":
  flags.mark_flag_as_required("config")
  command_line.launch(main)
