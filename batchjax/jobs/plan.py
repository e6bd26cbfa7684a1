"""What `batchjax plan` prints: a whole file planned window by window, on the host alone."""

import dataclasses
import pathlib
import resource
import textwrap
import time
from typing import Any

from batchjax.config import ConfigError, JobConfig, ModelSource
from batchjax.io.store import RequestReader
from batchjax.jobs.prepare import prepare
from batchjax.jobs.run import Loaders
from batchjax.plan import memory, planner
from batchjax.plan.cost import Chip
from batchjax.plan.summary import plan_summary
from batchjax.report.terminal import printable

# Weights loaded in a second: from GGUF, measured (Q4_1 to float32, two cores of an AMD EPYC); others assumed.
_GGUF_BYTES_PER_SEC, _OTHER_BYTES_PER_SEC = 1.5e8, 1e9
_WIDTH, _LABEL_WIDTH = 80, 10


def plan_file(config: JobConfig, input_path: str, directory: pathlib.Path, chip: Chip,
              loaders: Loaders = Loaders(), limit: int | None = None, scores: bool = False
              ) -> dict[str, Any]:
  """Validates, tokenizes and plans a file; JSON values.

  Args:
    config: of the job.
    input_path: requests.
    directory: for the tokenized requests.
    chip: whose roofline predicts the seconds in steps.
    loaders: how configuration and tokenizer are loaded.
    limit: only the first so many rows; None plans all.
    scores: rows are scored.

  Raises:
    ConfigError: the mesh is that of whatever machine runs the job, or does not divide the model.
  """
  if not config.engine.mesh.tensor:
    raise ConfigError("engine.mesh.tensor=0 takes all devices of the machine that runs the job, and "
                      "a plan is made without one: name their number")
  start = time.perf_counter()
  model, tokenizer = loaders.read(config.model)
  prepared = prepare(input_path, directory / "requests.arrow", config, model, tokenizer, limit, scores)
  prepared_secs = time.perf_counter() - start
  device_bytes = None if chip.name == "cpu" else int(memory.DEVICE_SHARE * chip.hbm_bytes)
  windows, engine = [], memory.settle(model, config.engine, chip, device_bytes)
  with RequestReader(directory / "requests.arrow") as requests:
    buckets, num_first = None, 0
    for positions in requests.windows(engine.plan_window):
      window = [row.request for row in requests.take(positions)]
      plan = planner.make_plan(model, window, engine, chip, buckets=buckets,
                               is_only_window=len(window) == len(requests))
      buckets, num_first = plan.buckets, num_first or len(window)
      windows.append(plan_summary(plan))
    num_requests = len(requests)
  totals = {name: sum(w["totals"][name] for w in windows)
            for name in ("prompt_tokens_asked", "prompt_tokens_computed", "optimum")}
  estimate = memory.estimate_memory(model, engine)
  predicted = _predict(config, windows[0], num_requests / num_first,
                       estimate.weight_bytes) if windows else None
  return {
      "rows": prepared.num_rows, "requests": num_requests,
      "errors": [str(error) for error in prepared.errors],
      "carried": list(prepared.carried),
      "windows": len(windows), **totals,
      "decode_tokens_at_most": sum(w["decode_tokens_at_most"] for w in windows),
      "shared_nodes": sum(w["shared_nodes"] for w in windows),
      "first_window": windows[0] if windows else None, "predicted": predicted,
      "memory": dataclasses.asdict(estimate) | {"total_bytes": estimate.total_bytes},
      "chip": chip.name, "num_devices": engine.mesh.tensor,
      "read_secs": round(prepared_secs, 2),
      "plan_secs": round(time.perf_counter() - start - prepared_secs, 2),
      "peak_host_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
  }


def _predict(config: JobConfig, first_window: dict[str, Any], num_windows: float,
             weight_bytes: int) -> dict[str, float]:
  """Seconds of a job, by what they go to; windows after the first one are taken to be like it."""
  num_shapes = len(first_window["buckets"])
  load_bytes_per_sec = _GGUF_BYTES_PER_SEC if _is_gguf(config.model) else _OTHER_BYTES_PER_SEC
  secs = {"step_secs": first_window["predicted_secs"] * num_windows,
          "compile_secs": config.engine.first_compile_secs + num_shapes * config.engine.compile_secs,
          "load_secs": weight_bytes / load_bytes_per_sec}
  return {"total_secs": round(sum(secs.values()), 2),
          **{name: round(value, 2) for name, value in secs.items()},
          "load_bytes_per_sec": load_bytes_per_sec, "num_windows": round(num_windows, 3)}


def _is_gguf(source: ModelSource) -> bool:
  return source.format == "gguf" or source.format == "auto" and source.path.endswith(".gguf")


def to_text(plan: dict[str, Any]) -> str:
  """The same for people, in 80 columns but for error rows."""
  asked, computed = plan["prompt_tokens_asked"], plan["prompt_tokens_computed"]
  gib = lambda name: f"{plan['memory'][name] / 2**30:.2f} GiB"
  lines = [
      ("rows", f"{plan['rows']:,}: {plan['requests']:,} requests, {len(plan['errors']):,} errors"),
      *(("", printable(error)) for error in plan["errors"][:10]),
      *([("carried", printable(", ".join(plan["carried"][:20])))] if plan["carried"] else []),
      ("prompt", f"{asked:,} tokens asked, {computed:,} computed "
                 f"({1 - computed / max(asked, 1):.1%} shared), {plan['optimum']:,} at best"),
      ("output", f"{plan['decode_tokens_at_most']:,} tokens at most"),
      ("sharing", f"{plan['shared_nodes']:,} shared prefix{'' if plan['shared_nodes'] == 1 else 'es'}, "
                  f"requests planned in {plan['windows']} window{'' if plan['windows'] == 1 else 's'}"),
      ("memory", f"{gib('weight_bytes')} weights, {gib('kv_bytes')} KV, "
                 f"{gib('logits_bytes')} logits, {gib('activation_bytes')} activations"
                 + (f", on each of {plan['num_devices']} devices" if plan["num_devices"] > 1 else "")),
  ]
  if plan["first_window"]:
    lines += _prediction(plan)
  lines.append(("host", f"read in {plan['read_secs']} s, planned in {plan['plan_secs']} s, "
                        f"peak memory {plan['peak_host_bytes'] / 2**30:.2f} GiB"))
  fill = textwrap.TextWrapper(_WIDTH, subsequent_indent=" " * _LABEL_WIDTH, break_long_words=False,
                              break_on_hyphens=False).fill
  return "\n".join((fill if label else str)(f"{label:<{_LABEL_WIDTH}}{text}") for label, text in lines)


def _prediction(plan: dict[str, Any]) -> list[tuple[str, str]]:
  """What to expect of the first window, and of the whole."""
  first, secs, windows = plan["first_window"], plan["predicted"], plan["windows"]
  scope = "" if windows == 1 else " (first window)"
  return [
      *(("shape", f"{bucket['kind']}: {bucket['tokens']} tokens, {bucket['rows']} rows")
        for bucket in first["buckets"]),
      ("steps", f"{first['predicted_mixed_steps']:,} mixed steps, "
                f"{first['predicted_decode_loops']:,} decode loops, "
                f"{first['predicted_padding_waste']:.1%} of launched tokens are padding "
                f"({first['predicted_ladder_secs']:,} s for shapes that like jobs share), at most "
                f"{first['predicted_peak_pages']:,} of {first['num_pages']:,} KV pages{scope}"),
      ("predicted", f"{secs['total_secs']:,.1f} s in all: {secs['step_secs']:,.1f} s at least in steps "
                    f"on {plan['num_devices']} x {plan['chip']}{'' if windows == 1 else ', if windows are like the first'}, "
                    f"{secs['compile_secs']:,.1f} s compiling {len(first['buckets'])} shapes (none "
                    "where an earlier job has left them), "
                    f"{secs['load_secs']:,.1f} s loading {plan['memory']['weight_bytes'] / 1e9:,.2f} GB "
                    f"of weights at {secs['load_bytes_per_sec'] / 1e9:,.2f} GB/s"),
  ]
