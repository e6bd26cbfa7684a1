"""What `scripts/plan.py` prints: a whole file planned window by window, on the host alone."""

import dataclasses
import pathlib
import resource
import time
from typing import Any

from batchjax.config import ConfigError, JobConfig
from batchjax.io.store import RequestReader
from batchjax.jobs.prepare import prepare
from batchjax.jobs.run import Loaders
from batchjax.plan import memory, planner
from batchjax.plan.cost import Chip
from batchjax.plan.summary import plan_summary
from batchjax.report.terminal import printable


def plan_file(config: JobConfig, input_path: str, directory: pathlib.Path, chip: Chip,
              loaders: Loaders = Loaders()) -> dict[str, Any]:
  """Validates, tokenizes and plans a file; JSON values.

  Args:
    config: of the job.
    input_path: requests.
    directory: for the tokenized requests.
    chip: whose roofline predicts the seconds.
    loaders: how configuration and tokenizer are loaded.

  Raises:
    ConfigError: the mesh is that of whatever machine runs the job, or does not divide the model.
  """
  if not config.engine.mesh.tensor:
    raise ConfigError("engine.mesh.tensor=0 takes all devices of the machine that runs the job, and "
                      "a plan is made without one: name their number")
  start = time.perf_counter()
  model, tokenizer = loaders.read(config.model)
  prepared = prepare(input_path, directory / "requests.arrow", config, model, tokenizer)
  prepared_secs = time.perf_counter() - start
  device_bytes = None if chip.name == "cpu" else int(memory.DEVICE_SHARE * chip.hbm_bytes)
  windows, engine = [], memory.settle(model, config.engine, chip, device_bytes)
  with RequestReader(directory / "requests.arrow") as requests:
    buckets = None
    for positions in requests.windows(engine.plan_window):
      window = [row.request for row in requests.take(positions)]
      plan = planner.make_plan(model, window, engine, chip, buckets=buckets,
                               is_only_window=len(window) == len(requests))
      buckets = plan.buckets
      windows.append(plan_summary(plan))
    num_requests = len(requests)
  totals = {name: sum(w["totals"][name] for w in windows)
            for name in ("prompt_tokens_asked", "prompt_tokens_computed", "optimum")}
  estimate = memory.estimate_memory(model, engine)
  return {
      "rows": prepared.num_rows, "requests": num_requests,
      "errors": [str(error) for error in prepared.errors],
      "windows": len(windows), **totals,
      "decode_tokens_at_most": sum(w["decode_tokens_at_most"] for w in windows),
      "shared_nodes": sum(w["shared_nodes"] for w in windows),
      "first_window": windows[0] if windows else None,
      "memory": dataclasses.asdict(estimate) | {"total_bytes": estimate.total_bytes},
      "chip": chip.name, "num_devices": engine.mesh.tensor,
      "read_secs": round(prepared_secs, 2),
      "plan_secs": round(time.perf_counter() - start - prepared_secs, 2),
      "peak_host_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
  }


def to_text(plan: dict[str, Any]) -> str:
  """The same for people."""
  asked, computed = plan["prompt_tokens_asked"], plan["prompt_tokens_computed"]
  gib = lambda name: f"{plan['memory'][name] / 2**30:.2f} GiB"
  lines = [
      f"rows      {plan['rows']:,}: {plan['requests']:,} requests, {len(plan['errors']):,} errors",
      *(f"          {printable(error)}" for error in plan["errors"][:10]),
      f"prompt    {asked:,} tokens asked, {computed:,} computed "
      f"({1 - computed / max(asked, 1):.1%} shared), {plan['optimum']:,} at best",
      f"output    {plan['decode_tokens_at_most']:,} tokens at most",
      f"sharing   {plan['shared_nodes']:,} shared nodes in {plan['windows']} windows",
      f"memory    {gib('weight_bytes')} weights, {gib('kv_bytes')} KV, "
      f"{gib('logits_bytes')} logits, {gib('activation_bytes')} activations",
  ]
  if plan["num_devices"] > 1:
    lines[-1] += f", on each of {plan['num_devices']} devices"
  first = plan["first_window"]
  if first:
    lines += [f"shape     {bucket['kind']}: {bucket['tokens']} tokens, {bucket['rows']} rows"
              for bucket in first["buckets"]]
    lines.append(
        f"predicted {first['predicted_secs']:,} s at least on {plan['num_devices']} x {plan['chip']}"
        f"{' for the first window' if plan['windows'] > 1 else ''}: "
        f"{first['predicted_mixed_steps']:,} mixed steps, "
        f"{first['predicted_decode_loops']:,} decode loops, "
        f"{first['predicted_padding_waste']:.1%} padding "
        f"({first['predicted_ladder_secs']:,} s for shapes that like jobs share), "
        f"{first['predicted_peak_pages']:,} of {first['num_pages']:,} pages")
  lines.append(f"host      read in {plan['read_secs']} s, planned in {plan['plan_secs']} s, "
               f"peak memory {plan['peak_host_bytes'] / 2**30:.2f} GiB")
  return "\n".join(lines)
