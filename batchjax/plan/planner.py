"""Requests to a plan: order, shared nodes, compiled shapes and what to expect of them."""

import collections
import dataclasses
import functools
import math
import sys
from collections.abc import Callable, Collection, Sequence

from jaxtyping import Int
import numpy as np

from batchjax.config import EngineConfig, ModelConfig
from batchjax.plan import buckets as buckets_lib
from batchjax.plan import grouping, memory, order, simulate
from batchjax.plan.buckets import Bucket
from batchjax.plan.cost import Chip, PlanTotals, plan_totals
from batchjax.plan.prefix_tree import PrefixTree, build_prefix_tree
from batchjax.plan.scheduler import Scheduler
from batchjax.types import Request, SamplingParams, StopTable

# A kept node costs about this many tokens of work in segments, merges and part-filled pages.
_NODE_OVERHEAD_TOKENS = 8.0
# Enough dispatches to see every kind of step of a window many times.
_MAX_DISPATCHES = 300
# Multiples of it, modulo 1, spread evenly however many there are.
_GOLDEN_RATIO = 0.6180339887498949
# Sizes are rounded up to this before buckets are chosen among them.
_TOKEN_MULTIPLE, _ROW_MULTIPLE = 64, 8
# Loading a compiled shape, beside what compiling it costs.
_READ_SHARE = 0.05


@dataclasses.dataclass(frozen=True)
class Prediction:
  """What the simulated schedule says of a window.

  Attributes:
    secs: by the roofline of the chip, attention after the products, padding included.
    ladder_secs: the part of it that shapes cut to this job alone would spare; compiling those is not
      counted.
    num_mixed, num_decode: dispatches of each kind.
    padding_waste: part of the launched tokens that is padding.
    peak_pages: most pages in use.
    is_extrapolated: the window is longer than what was simulated.
  """

  secs: float
  ladder_secs: float
  num_mixed: int
  num_decode: int
  padding_waste: float
  peak_pages: int
  is_extrapolated: bool


@dataclasses.dataclass(frozen=True)
class Plan:
  """How one window of requests runs.

  Attributes:
    tree: kept nodes in the order of execution, which is that of the token axis.
    buckets: the compiled shapes, ascending within each kind.
    num_pages: of the KV pool.
    totals: prompt tokens asked for, planned and optimal.
    prediction: None where the buckets were given.
    rejected: request index to reason, for those that can never fit the pool.
  """

  tree: PrefixTree
  buckets: tuple[Bucket, ...]
  num_pages: int
  totals: PlanTotals
  prediction: Prediction | None
  rejected: dict[int, str]

  def bucket_for(self, kind: str, num_tokens: int) -> Bucket:
    """The smallest bucket of a kind that holds a step."""
    return pick_bucket(self.buckets, kind, num_tokens)


def pick_bucket(buckets: Sequence[Bucket], kind: str, num_tokens: int) -> Bucket:
  """The smallest bucket of `kind` that holds `num_tokens`.

  Raises:
    ValueError: none does.
  """
  same = [bucket for bucket in buckets if bucket.kind == kind]
  size = buckets_lib.pick([bucket.num_tokens for bucket in same], num_tokens)
  return next(bucket for bucket in same if bucket.num_tokens == size)


def _padded(buckets: Sequence[Bucket], kind: str, num_tokens: int) -> int:
  """Tokens launched for a step, or for the steps that it is cut into."""
  largest = max(bucket.num_tokens for bucket in buckets if bucket.kind == kind)
  whole = num_tokens // largest * largest
  return whole + (pick_bucket(buckets, kind, num_tokens - whole).num_tokens
                  if num_tokens > whole else 0)


def make_plan(model: ModelConfig, requests: Sequence[Request], engine: EngineConfig, chip: Chip, *,
              buckets: tuple[Bucket, ...] | None = None, available: Collection[tuple[Bucket, int]] = (),
              is_only_window: bool = True, stop_table: StopTable | None = None) -> Plan:
  """Plans a window: the tree of shared prefixes, its order, and the shapes to compile.

  Args:
    model: shapes of the model.
    requests: of the window, at least one.
    engine: limits.
    chip: whose roofline weighs padding against compiling.
    buckets: those of an earlier window, whose shapes are compiled already.
    available: shapes that an earlier job left compiled, each with the slots of its state; they cost
      no compiling.
    is_only_window: no other window follows, so shapes may be cut to this one.
    stop_table: stop automata, if any request has stop strings.
  """
  prompts = [request.prompt_token_ids for request in requests]
  params = [request.sampling_params for request in requests]
  prompt_lens = np.array([len(prompt) for prompt in prompts], np.int32)
  samples = np.array([p.n for p in params], np.int32)
  max_tokens = np.array([p.max_tokens for p in params], np.int64)
  decode_lens = max_tokens * samples
  full_tree = build_prefix_tree(prompts, samples)
  if engine.share_prefixes:
    tree = grouping.choose_nodes(full_tree, prompt_lens, samples, engine.max_levels,
                                 _NODE_OVERHEAD_TOKENS)
  else:
    tree = grouping.no_sharing(prompt_lens, samples)
  tree = order.order_nodes(tree, decode_lens)
  num_pages = memory.num_kv_pages(model, engine)
  model = model.of_device(engine.mesh.tensor)  # each computes its share of a step
  plan = Plan(tree=tree, buckets=buckets or (), num_pages=num_pages,
              totals=plan_totals(full_tree, tree, samples, decode_lens), prediction=None,
              rejected=memory.check_fits(tree, max_tokens, num_pages, engine.page_size))
  if buckets is not None or plan.rejected:
    return plan

  total_rows = int(samples.sum())
  max_rows = min(engine.max_rows, total_rows) if is_only_window else engine.max_rows
  max_tokens_mixed = engine.max_step_tokens
  if is_only_window:
    max_tokens_mixed = min(max_tokens_mixed, int(tree.length.sum()) + total_rows)
  likely = _likely_lengths(params, max_tokens)
  shapes = simulate.simulate(
      make_scheduler(requests, plan, engine, max_rows, max_tokens_mixed, stop_table, likely),
      _MAX_DISPATCHES, max(p.top_logprobs for p in params))
  if is_only_window and len(shapes) < _MAX_DISPATCHES and all(p.ignore_eos for p in params):
    # The simulation is the job: where the pool holds fewer rows, no step need be wider.
    most = max(shape.num_slots for shape in shapes)
    max_rows = min(max_rows, -(-most // _ROW_MULTIPLE) * _ROW_MULTIPLE)
  num_shared = int((tree.num_rows[1:] > 1).sum()) if is_only_window else sys.maxsize
  drawn = int((likely * samples).sum())
  scale = _scale(shapes, plan.totals.prompt_tokens_planned, drawn)
  step_secs = {kind: _step_secs(model, chip, shapes, kind) for kind in scale}
  solve = functools.partial(_solve, engine, shapes, scale, step_secs, max_tokens_mixed,
                            is_only_window)
  states = _states(max_rows, num_shared, num_pages, engine, available)
  _, buckets = min((solve(state, available, may_compile) for state in states
                    for may_compile in (False, True)), key=lambda solution: solution[0])
  _, cut_buckets = solve(Bucket("mixed", 0, max_rows, 0, num_pages), None)
  return dataclasses.replace(plan, buckets=buckets, prediction=_predict(
      model, chip, shapes, scale, buckets, cut_buckets))


def _likely_lengths(params: Sequence[SamplingParams],
                    max_tokens: Int[np.ndarray, "requests"]) -> Int[np.ndarray, "requests"]:
  """The output lengths that the simulation takes the samples of each request to reach.

  Rows that ignore the model's end tokens reach `max_tokens`. Of the others nothing is known, so
  their lengths are spread evenly up to it: batches shrink towards the end of such a job, and
  its shapes must suit that too.
  """
  spread = (np.arange(len(params)) * _GOLDEN_RATIO) % 1.0
  ignores = np.array([p.ignore_eos for p in params], bool)
  return np.where(ignores, max_tokens, np.ceil(max_tokens * (1.0 - spread)).astype(np.int64))


def make_scheduler(requests: Sequence[Request], plan: Plan, engine: EngineConfig, max_rows: int,
                   max_step_tokens: int, stop_table: StopTable | None,
                   max_tokens: Int[np.ndarray, "requests"] | None = None) -> Scheduler:
  """A scheduler for the window of `plan`; `max_tokens` are those of the requests when None."""
  return Scheduler(requests, plan.tree, num_pages=plan.num_pages, page_size=engine.page_size,
                   max_rows=max_rows, max_step_tokens=max_step_tokens,
                   max_decode_steps=engine.max_decode_steps, stop_table=stop_table,
                   max_tokens=max_tokens)


def _scale(shapes: list[simulate.StepShape], prompt_tokens: int,
           drawn_tokens: int) -> dict[str, float]:
  """How often each simulated dispatch stands for one of the whole window, by kind.

  Mixed steps in proportion to the prompt tokens, decode loops to the tokens that mixed steps
  leave to draw.
  """
  drawn = collections.Counter()
  for shape in shapes:
    drawn[shape.kind] += shape.num_rows * shape.num_steps
  mixed = max(1.0, prompt_tokens / max(sum(shape.num_prompt_tokens for shape in shapes), 1))
  return {"mixed": mixed,
          "decode": max(1.0, (drawn_tokens - mixed * drawn["mixed"]) / max(drawn["decode"], 1))}


def _states(max_rows: int, num_shared: int, num_pages: int, engine: EngineConfig,
            available: Collection[tuple[Bucket, int]]) -> set[Bucket]:
  """What all shapes of a job have in common, as buckets without tokens: its own, and those that exist."""
  segments = lambda rows: rows + min(rows * engine.max_levels, num_shared)
  rows = buckets_lib.ladder(max_rows, _ROW_MULTIPLE)
  rows = rows if rows <= engine.max_rows else max_rows
  # Segments cost next to nothing.
  own = Bucket("mixed", 0, rows, 1 << (segments(rows) - 1).bit_length(), num_pages)
  # Fewer rows than asked for: the others wait.
  return {own} | {b._replace(num_tokens=0) for b, _ in available
                  if b.kind == "mixed" and b.num_page_indices == num_pages
                  and b.num_segments >= segments(min(b.num_rows, engine.max_rows))}


def _step_secs(model: ModelConfig, chip: Chip, shapes: list[simulate.StepShape],
               kind: str) -> Callable[[int], float]:
  """Predicted seconds of a typical step of a kind, by its size."""
  same = [shape for shape in shapes if shape.kind == kind]
  if not same:
    return lambda size: 0.0
  typical = same[len(same) // 2]
  return lambda size: typical.secs(model, chip, size) / typical.num_steps


def _solve(engine: EngineConfig, shapes: list[simulate.StepShape], scale: dict[str, float],
           step_secs: dict[str, Callable[[int], float]], max_step_tokens: int, is_whole: bool,
           state: Bucket, available: Collection[tuple[Bucket, int]] | None, may_compile: bool = True
           ) -> tuple[float, tuple[Bucket, ...]]:
  """The best shapes over a state of given sizes, and the seconds that they cost.

  `available` None asks for shapes cut to this job alone. Where nothing may be compiled, the cost
  is infinite unless those that are available do.
  """
  num_rows = state.num_rows
  total, buckets = engine.first_compile_secs if may_compile else 0.0, []
  compile_secs = engine.compile_secs if may_compile else math.inf
  for kind, limit, most, multiple in (
      ("mixed", max(max_step_tokens, num_rows), engine.max_step_tokens, _TOKEN_MULTIPLE),
      ("decode", num_rows, num_rows, _ROW_MULTIPLE)):
    weights = collections.Counter()
    for step in shapes:
      if step.kind == kind:
        weights[min(step.num_tokens, limit)] += (
            scale[kind] * step.num_steps * -(-step.num_tokens // limit))
    shape = lambda size: state._replace(
        kind=kind, num_tokens=size, num_rows=num_rows if kind == "mixed" else size)
    if available is None:
      rung = lambda size: min(-(-size // multiple) * multiple, limit)
    else:
      rung = lambda size: min(buckets_lib.ladder(size, multiple), max(most, limit))
    known = {b.num_tokens for b, slots in available or ()
             if (b, slots) == (shape(b.num_tokens), num_rows)}
    candidates = {rung(size) for size in (*weights, limit)} | known
    # Larger steps of a job that is known as a whole may be cut to a shape that exists.
    cut = known if is_whole and kind == "mixed" else ()
    secs, sizes = buckets_lib.solve_buckets(
        list(weights), list(weights.values()), candidates=candidates,
        lasts={size for size in candidates if size >= limit or size in cut and size > num_rows},
        max_buckets=engine.max_buckets, step_cost_fn=step_secs[kind],
        compile_cost_fn=lambda size: (_READ_SHARE * engine.compile_secs if size in known
                                      else compile_secs))
    total += secs
    buckets += map(shape, sizes)
  return total, tuple(buckets)


def _predict(model: ModelConfig, chip: Chip, shapes: list[simulate.StepShape],
             scale: dict[str, float], buckets: Sequence[Bucket],
             cut_buckets: Sequence[Bucket]) -> Prediction:
  sizes_in = lambda buckets: [_padded(buckets, shape.kind, shape.num_tokens) for shape in shapes]
  secs_of = lambda sizes: sum(scale[shape.kind] * shape.secs(model, chip, size)
                              for size, shape in zip(sizes, shapes))
  sizes = sizes_in(buckets)
  launched = sum(size * shape.num_steps for size, shape in zip(sizes, shapes))
  useful = sum(shape.num_tokens * shape.num_steps for shape in shapes)
  dispatches = collections.Counter(shape.kind for shape in shapes)
  secs = secs_of(sizes)
  return Prediction(
      secs=secs, ladder_secs=secs - secs_of(sizes_in(cut_buckets)),
      num_mixed=round(scale["mixed"] * dispatches["mixed"]),
      num_decode=round(scale["decode"] * dispatches["decode"]),
      padding_waste=1 - useful / max(launched, 1),
      peak_pages=max((shape.used_pages for shape in shapes), default=0),
      is_extrapolated=len(shapes) == _MAX_DISPATCHES)


def cached_tokens(requests: Sequence[Request], engine: EngineConfig) -> np.ndarray:
  """Prompt tokens of each request that another one computes: i64[num_requests].

  Depends on the requests alone, not on what happens to run: the first request
  of a shared node (in order of requests) counts as the one that computes it.
  """
  prompts = [request.prompt_token_ids for request in requests]
  prompt_lens = np.array([len(prompt) for prompt in prompts], np.int32)
  samples = np.array([request.sampling_params.n for request in requests], np.int32)
  if not engine.share_prefixes:
    return np.zeros(len(requests), np.int64)
  tree = grouping.choose_nodes(build_prefix_tree(prompts, samples), prompt_lens, samples,
                               engine.max_levels, _NODE_OVERHEAD_TOKENS)
  owner = order.lowest_request(tree)
  computed = np.bincount(owner[1:], tree.length[1:], len(requests))
  return prompt_lens - computed.astype(np.int64)
