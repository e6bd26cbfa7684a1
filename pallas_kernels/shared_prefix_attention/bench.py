"""Checks shared_prefix_attention against float64 on this device, then times it.

  python -m pallas_kernels.shared_prefix_attention.bench [--check small|none] [--cases a,b]

Prints one line per case and at last one line of JSON. Beside each figure stands its limit:
the streaming bandwidth (bytes of KV, each read once) or the matrix-product rate, both
measured in the same run, and cuDNN's time where `jax.nn.dot_product_attention` can do the
same work on contiguous KV.
"""

import argparse
import concurrent.futures
import functools
import json
import pathlib
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.shared_prefix_attention import gpu
from pallas_kernels.shared_prefix_attention import Segments
from pallas_kernels.shared_prefix_attention import specs

_UNROLL = 3  # layers of a dispatch
# Steps of a job with 400 groups, each with 32 groups of its own: so many sets of pages, taken in turn.
_TURNS = {"mixed": 13, "mixed_decode": 13, "mixed_chunks": 13}
# A CUDA graph, as in a decode loop of an engine: else the host's launches are timed too.
_COMPILER_OPTIONS = {"xla_gpu_enable_command_buffer": "FUSION,CUBLAS,CUBLASLT,CUSTOM_CALL"}


def arrays(layout: specs.Layout, *, only: str | None = None) -> tuple:
  """Segments, page list and positions; `only` keeps the segments of "prefix" or "own" KV."""
  fields = dict(layout.segments)
  if only is not None:
    own = layout.positions[np.minimum(fields["q_start"], len(layout.positions) - 1)]
    own = fields["kv_start"] + fields["kv_len"] > own
    keep = own if only == "own" else ~own
    fields = {k: np.where(keep, v, 0) for k, v in fields.items()}
  segments = Segments(**{k: jnp.asarray(v) for k, v in fields.items()})
  return segments, jnp.asarray(layout.page_indices), jnp.asarray(layout.positions)


@functools.partial(jax.jit, static_argnames=("shape", "dtype"))
def _random(seed, shape, dtype):
  return jax.random.normal(jax.random.key(seed), shape, dtype)


def device_values(spec: specs.Spec, layout: specs.Layout, turns: int):
  """q and kv_pages of a large case, made on the device, NaN where nobody may read."""
  dtype = jnp.dtype(spec.dtype)
  q = _random(0, (len(layout.positions), spec.num_heads, spec.head_dim), dtype)
  shape = (turns * layout.num_pages, spec.num_kv_heads, spec.page_size, 2 * spec.head_dim)
  poison = jax.jit(lambda kv, ok: jnp.where(ok[:, None, :, None], kv, jnp.nan), donate_argnums=0)
  return q, poison(_random(1, shape, dtype), jnp.asarray(np.tile(layout.readable, (turns, 1))))


def seconds(fn, *args, repeat: int = 10) -> float:
  """Median time of a call, from batches of calls that follow one another on the device."""
  jax.block_until_ready(fn(*args))
  times = []
  for _ in range(3):
    start = time.perf_counter()
    for _ in range(repeat):
      out = fn(*args)
    jax.block_until_ready(out)
    times.append((time.perf_counter() - start) / repeat)
  return float(np.median(times))


def ceilings() -> dict:
  """Bytes per second that a large read streams, and bf16 matrix-product flops per second."""
  x = _random(2, (2 << 30,), jnp.bfloat16).reshape(-1, 1 << 14)
  read = seconds(jax.jit(lambda x: jnp.max(x, axis=1)), x)
  copy = seconds(jax.jit(lambda x: -x), x)
  n = 8192
  a, b = _random(3, (n, n), jnp.bfloat16), _random(4, (n, n), jnp.bfloat16)
  gemm = seconds(jax.jit(lambda a, b: a @ b), a, b)
  return {"bytes_per_sec": max(x.nbytes / read, 2 * x.nbytes / copy),
          "read_bytes_per_sec": x.nbytes / read, "copy_bytes_per_sec": 2 * x.nbytes / copy,
          "flops_per_sec": 2 * n ** 3 / gemm}


def shapes(spec: specs.Spec) -> dict:
  return dict(page_size=spec.page_size, num_heads=spec.num_heads, num_kv_heads=spec.num_kv_heads,
              head_dim=spec.head_dim)


def attend_fn(spec: specs.Spec):
  """Attention of some schedules, a layer each, fed with the last one's output."""
  run = jax.jit(functools.partial(  # traced once for all layers
      gpu.attend, scale=spec.scale, window=spec.window, soft_cap=spec.soft_cap))
  def layers(q, kv_pages, schedules):
    for schedule in schedules[:-1]:
      q, _ = run(q, kv_pages, schedule)
    return run(q, kv_pages, schedules[-1])
  return jax.jit(layers)


def schedule_fn(spec: specs.Spec, tiling=None, max_levels: int = 4):
  return jax.jit(functools.partial(gpu.make_schedule, tiling=tiling, max_levels=max_levels,
                                   **shapes(spec)))


def errors(spec, layout, q, kv_pages, out, tokens) -> dict:
  """Distance of an output from the float64 definition on some tokens."""
  o, lse = (np.asarray(x[tokens], np.float64) for x in out)
  exact_o, exact_lse = specs.exact(spec, layout, q, kv_pages, tokens)
  seen = np.isfinite(exact_lse)
  norm = np.linalg.norm(exact_o)
  lse_error = np.abs(np.where(seen, lse - np.where(seen, exact_lse, 0.0), 0.0)).max()
  return {"o": float(np.linalg.norm(o - exact_o) / norm) if norm else float(np.abs(o).max()),
          "lse": float(lse_error),
          "ok": bool((np.isneginf(lse) == ~seen).all() and np.isfinite(o).all()
                     and np.linalg.norm(o - exact_o) <= 6e-3 * norm and lse_error < 2e-3)}


def check_small(names) -> list:
  """Every small case, compiled in parallel."""
  def prepare(name):
    spec = specs.SMALL[name]
    case = specs.build(spec)
    schedule = schedule_fn(spec)(*arrays(case.layout))
    args = jnp.asarray(case.q), jnp.asarray(case.kv_pages), [schedule]
    return spec, case, args, attend_fn(spec).lower(*args).compile()
  results = []
  with concurrent.futures.ThreadPoolExecutor(8) as pool:
    for name, (spec, case, args, attend) in zip(names, pool.map(prepare, names)):
      got = errors(spec, case.layout, case.q, case.kv_pages, attend(*args),
                   np.arange(len(case.layout.positions)))
      results.append({"check": name, **got})
      print(f"check {name:24s} o {got['o']:.1e} lse {got['lse']:.1e} "
            f"{'ok' if got['ok'] else 'WRONG'}", flush=True)
  return results


def work(layout: specs.Layout, s: dict, spec: specs.Spec) -> tuple[int, int]:
  """KV bytes read once, and flops of the visible scores and their products with V."""
  pages = set()
  pairs = 0
  for start, length, kv_start, kv_len, page in zip(
      s["q_start"], s["q_len"], s["kv_start"], s["kv_len"], s["page_start"]):
    pages.update(layout.page_indices[page:page + -(-kv_len // spec.page_size)].tolist())
    seen = layout.positions[start:start + length] + 1 - kv_start
    pairs += int(np.clip(seen, 0, kv_len).sum())
  tokens = int(layout.readable[sorted(pages)].sum())
  num_bytes = tokens * spec.num_kv_heads * 2 * spec.head_dim * jnp.dtype(spec.dtype).itemsize
  return num_bytes, 4 * pairs * spec.num_heads * spec.head_dim


class Prepared(NamedTuple):
  """A large case compiled; `variant` is "", "prefix", "own" or "one-level"."""

  name: str
  variant: str
  label: str
  layout: specs.Layout
  inputs: tuple
  make: jax.stages.Compiled
  once: jax.stages.Compiled | None
  layers: jax.stages.Compiled


def prepare(name: str, variant: str = "", tiling=None, label: str = "") -> Prepared:
  """Compiles a large case: its KV all, of prefixes or rows alone, or folded into one level."""
  spec = specs.LARGE[name]
  layout = specs.lay_out(spec, one_level=variant == "one-level")
  inputs = arrays(layout, only=variant if variant in ("prefix", "own") else None)
  make = schedule_fn(spec, tiling, 1 if variant == "one-level" else 2)
  turns = _TURNS.get(name, 1)
  kv_shape = (turns * layout.num_pages, spec.num_kv_heads, spec.page_size, 2 * spec.head_dim)
  q_shape = (len(layout.positions), spec.num_heads, spec.head_dim)
  abstract = jax.ShapeDtypeStruct(q_shape, spec.dtype), jax.ShapeDtypeStruct(kv_shape, spec.dtype)
  schedule = jax.eval_shape(make, *inputs)
  # With a part of the KV there is no definition to check against.
  once = None if variant in ("prefix", "own") else attend_fn(spec).lower(
      *abstract, [schedule]).compile()
  layers = attend_fn(spec).lower(*abstract, [schedule] * max(turns, _UNROLL))
  return Prepared(name, variant, label, layout, inputs, make.lower(*inputs).compile(), once,
                  layers.compile(_COMPILER_OPTIONS))


def measure(case: Prepared, limits: dict, outputs: dict) -> dict:
  """Checks a case, then times it.

  A few tokens are compared with float64, three runs with each other (they must be the same
  bit by bit), and all tokens of the one-level variant with `outputs` of the full case.
  """
  spec, layout, turns = specs.LARGE[case.name], case.layout, _TURNS.get(case.name, 1)
  q, kv_pages = device_values(spec, layout, turns)
  segments, page_indices, positions = case.inputs
  schedules = [case.make(segments, page_indices + i % turns * layout.num_pages, positions)
               for i in range(max(turns, _UNROLL))]
  result = {"case": case.name, "variant": case.variant, "label": case.label}
  if case.once is not None:
    tokens = np.unique(np.linspace(0, len(layout.positions) - 1, 6).astype(int))
    out = case.once(q, kv_pages, schedules[:1])
    result["error"] = errors(spec, layout, q, kv_pages, out, tokens)
    again = [case.once(q, kv_pages, schedules[:1])[0] for _ in range(2)]
    result["error"]["stable"] = all(bool((out[0] == o).all()) for o in again)
    result["error"]["ok"] &= result["error"]["stable"]
    if case.variant == "one-level" and case.name in outputs:
      far = jnp.linalg.norm((out[0] - outputs[case.name]).astype(jnp.float32).ravel())
      far /= jnp.linalg.norm(out[0].astype(jnp.float32).ravel())
      result["error"]["from_full"] = float(far)
      result["error"]["ok"] &= float(far) < 6e-3
    elif not case.variant:
      outputs[case.name] = out[0]
    del out, again
  fields = {k: np.asarray(v) for k, v in case.inputs[0]._asdict().items()}
  num_bytes, flops = work(layout, fields, spec)
  secs = seconds(case.layers, q, kv_pages, schedules) / len(schedules)
  result |= {"secs": secs, "schedule_secs": seconds(case.make, *case.inputs),
             "bytes": num_bytes, "flops": flops,
             "share_of_bandwidth": num_bytes / secs / limits["bytes_per_sec"],
             "share_of_gemm": flops / secs / limits["flops_per_sec"],
             "items": schedules[0].ranges[:, 1].tolist()}
  ok = result.get("error", {}).get("ok", "-")
  print(f"{case.name:26s} {case.variant:9s} {case.label:20s} {secs * 1e6:9.1f} us  "
        f"{num_bytes / secs / 1e12:5.2f} TB/s {result['share_of_bandwidth']:5.1%}  "
        f"{flops / secs / 1e12:6.1f} TFLOP/s {result['share_of_gemm']:5.1%}  "
        f"schedule {result['schedule_secs'] * 1e6:5.0f} us  ok {ok}", flush=True)
  return result


def cudnn_secs(name: str) -> float | None:
  """cuDNN on contiguous KV: rows of one length, or one causal prompt; None elsewhere."""
  spec = specs.LARGE[name]
  first = spec.forest[0]
  if not all(isinstance(r, specs.Row) and r == first for r in spec.forest):
    return None
  kv_len = first.cached + first.new
  if first.new > 1 and first.cached:
    return None
  q = _random(5, (len(spec.forest), first.new, spec.num_heads, spec.head_dim), jnp.bfloat16)
  shape = (len(spec.forest), kv_len, spec.num_kv_heads, spec.head_dim)
  k, v = _random(6, shape, jnp.bfloat16), _random(7, shape, jnp.bfloat16)
  fn = jax.jit(functools.partial(jax.nn.dot_product_attention, is_causal=first.new > 1,
                                 implementation="cudnn"))
  return seconds(fn, q, k, v)


def main():
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--check", default="small", choices=("small", "none"))
  parser.add_argument("--small", default=",".join(specs.SMALL))
  parser.add_argument("--cases", default=",".join(specs.LARGE))
  parser.add_argument("--variants", default="prefix,one-level")
  parser.add_argument("--out", help="also write the JSON to this file")
  args = parser.parse_args()
  device = jax.devices()[0]
  report = {"device": device.device_kind, "jax": jax.__version__, "checks": [], "cases": []}
  print(device.device_kind, "jax", jax.__version__, flush=True)
  if args.check == "small":
    report["checks"] = check_small(args.small.split(","))
  todo = []
  for name in filter(None, args.cases.split(",")):
    todo.append((name, ""))
    if name not in _TURNS and any(isinstance(root, specs.Node)
                                  for root in specs.LARGE[name].forest):
      variants = "one-level" if name.startswith("small") else args.variants
      todo += [(name, v) for v in variants.split(",") if v]
  with concurrent.futures.ThreadPoolExecutor(16) as pool:  # to the end: timing needs the host
    prepared = list(pool.map(lambda c: prepare(*c), todo))
  limits = report["limits"] = ceilings()
  print({k: f"{v / 1e12:.2f}T" for k, v in limits.items()}, flush=True)
  outputs = {}
  for case in prepared:
    result = measure(case, limits, outputs)
    if not case.variant:
      result["cudnn_secs"] = cudnn_secs(case.name)
      if result["cudnn_secs"]:
        print(f"{'':26s} cuDNN {result['cudnn_secs'] * 1e6:9.1f} us", flush=True)
    report["cases"].append(result)
  print(json.dumps(report))
  if args.out:
    pathlib.Path(args.out).write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
  main()
