"""Times batchjax against Hugging Face transformers on one workload, in one run, on the CPU.

    pip install torch transformers
    batchjax compare --config=smollm2_135m

64 requests share a prefix of random tokens, each with some of its own, greedy, a fixed
number of output tokens. Loading, compiling and warm-up are left out of both. Prints
seconds, the ratio, where batchjax's time went, and how many token ids agree.

Exit codes: 0 done, 2 refused or failed, with one line that says why, 130 interrupted.
"""

import json
import os
import pathlib
import tempfile
import time

from absl import flags
import numpy as np

from batchjax.commands import command_line
from batchjax.config import ConfigError, EngineConfig, ModelSource
from batchjax.generation import generate, StepEvent
from batchjax.jobs.run import configure_jax
from batchjax.plan.planner import Plan
from batchjax.types import Request, SamplingParams
from batchjax.weights import load_hf_config, load_model, Model, save_hf



def define_flags() -> None:
  """Those of `batchjax compare`."""
  command_line.define_config()
  flags.DEFINE_integer("num_requests", 64, "Requests.", lower_bound=1)
  flags.DEFINE_integer("prefix_len", 512, "Shared prompt tokens.")
  flags.DEFINE_integer("own_len", 32, "Further prompt tokens of each request.")
  flags.DEFINE_integer("output_len", 32, "Tokens to generate.")
  flags.DEFINE_integer("peer_batch", 16, "Rows of a padded batch of transformers.")
  flags.DEFINE_bool("peer", True, "Time transformers too.")


def run_batchjax(model: Model, prompts: np.ndarray, engine: EngineConfig, output_len: int) -> dict:
  """Seconds from the first plan to the last completion, and the tokens."""
  params = SamplingParams(temperature=0.0, max_tokens=output_len, ignore_eos=True)
  requests = [Request(str(i), prompt, params) for i, prompt in enumerate(prompts)]
  begin, events = [], []

  def observe(event):
    if isinstance(event, Plan):
      begin.append(time.perf_counter())
    elif isinstance(event, StepEvent):
      events.append(event)

  tokens = {c.request_id: c.choices[0].token_ids.tolist()
            for c in generate(model, requests, engine, observe=observe)}
  secs = time.perf_counter() - begin[0]
  by_kind = {kind: round(sum(e.step_secs for e in events if e.batch.kind == kind), 2)
             for kind in ("mixed", "decode")}
  host = sum(e.host_secs for e in events)
  return {"secs": round(secs, 2), "secs_by_kind": by_kind, "host_secs": round(host, 3),
          "prompt_tokens_computed": sum(e.batch.num_prompt_tokens for e in events),
          "tokens": [tokens[str(i)] for i in range(len(prompts))]}


def run_transformers(model: Model, prompts: np.ndarray, source: ModelSource, output_len: int,
                     batch_rows: int) -> dict:
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
  options = dict(max_new_tokens=output_len, do_sample=False, pad_token_id=0)
  peer.generate(torch.tensor(prompts[:1, :8], dtype=torch.long), **options)
  start, tokens = time.perf_counter(), []
  for first in range(0, len(prompts), batch_rows):
    batch = torch.tensor(prompts[first:first + batch_rows], dtype=torch.long)
    out = peer.generate(batch, attention_mask=torch.ones_like(batch), **options)
    tokens += out[:, batch.shape[1]:].tolist()
  return {"secs": round(time.perf_counter() - start, 2), "tokens": tokens}


def main(args: flags.FlagValues) -> None:
  """Prints one line of JSON."""
  config = command_line.job_config(args.config)
  configure_jax()
  model = load_model(config.model)
  rng = np.random.default_rng(0)
  draw = lambda *shape: rng.integers(3, model.config.vocab_size, shape).astype(np.int32)
  prefix = np.tile(draw(1, args.prefix_len), (args.num_requests, 1))
  prompts = np.concatenate([prefix, draw(args.num_requests, args.own_len)], axis=1)
  result = {"batchjax": run_batchjax(model, prompts, config.engine, args.output_len)}
  if args.peer:
    result["transformers"] = run_transformers(model, prompts, config.model, args.output_len,
                                              args.peer_batch)
    mine, theirs = (result[name]["tokens"] for name in ("batchjax", "transformers"))
    result["ratio"] = round(result["transformers"]["secs"] / result["batchjax"]["secs"], 2)
    result["requests_with_equal_tokens"] = sum(a == b for a, b in zip(mine, theirs))
  for entry in result.values():
    if isinstance(entry, dict):
      del entry["tokens"]
  print(json.dumps(result))
