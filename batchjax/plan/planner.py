"""Requests to a plan: order, shared nodes, compiled shapes and what to expect of them."""

import collections
import dataclasses
import functools
import itertools
import math
import sys
from collections.abc import Callable, Collection, Sequence

import numpy as np

from batchjax.config import EngineConfig, ModelConfig
from batchjax.plan import buckets as buckets_lib
from batchjax.plan import grouping, memory, order, simulate
from batchjax.plan.buckets import Bucket
from batchjax.plan.cost import Chip, PlanTotals, plan_totals
from batchjax.plan.lengths import likely_lengths
from batchjax.plan.prefix_tree import PrefixTree, build_prefix_tree
from batchjax.plan.scheduler import Scheduler
from batchjax.types import Request, SamplingParams, StopTable

# A kept node costs about this many tokens of work in segments, merges and part-filled pages.
_NODE_OVERHEAD_TOKENS = 8.0
# Enough dispatches to see every kind of step of a window many times, over all draws of lengths.
_MAX_DISPATCHES = 300
# Sizes are rounded up to this before buckets are chosen among them.
_TOKEN_MULTIPLE, _ROW_MULTIPLE = 64, 8
# Loading a compiled shape, beside what compiling it costs.
_READ_SHARE = 0.05


@dataclasses.dataclass(frozen=True)
class Prediction:
  """What the simulated schedule says of a window; means over likely lengths where those are unknown.

  Attributes:
    secs: by the roofline of the chip, attention after the products, padding included.
    ladder_secs: the part of it that shapes cut to this job alone would spare; compiling those is not
      counted.
    num_mixed, num_decode: dispatches of each kind.
    padding_waste: part of the launched tokens that is padding.
    peak_pages: most pages in use, by any of the likely lengths.
    is_extrapolated: the window is longer than what was simulated.
    step_secs: of a typical step in each bucket of the plan.
  """

  secs: float
  ladder_secs: float
  num_mixed: int
  num_decode: int
  padding_waste: float
  peak_pages: int
  is_extrapolated: bool
  step_secs: tuple[float, ...]


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

  >>> prefix = tokenizer.encode("The quick brown fox jumps over ")
  >>> requests = [batchjax.Request(word, prefix + tokenizer.encode(word, add_special_tokens=False))
  ...             for word in ("dogs", "cats", "me")]
  >>> engine = batchjax.EngineConfig(num_pages=64)
  >>> plan = batchjax.make_plan(model.config, requests, engine, batchjax.CHIPS["h100"])
  >>> plan.totals.prompt_tokens_asked, plan.totals.prompt_tokens_planned
  (106, 42)
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
  in_order = np.argsort(tree.node_of_request, kind="stable")
  in_order = np.repeat(in_order, samples[in_order])
  least = np.array([_least_tokens(p) for p in params], np.int64)
  draws = likely_lengths(least[in_order], max_tokens[in_order])
  are_known, max_dispatches = len(draws) == 1, _MAX_DISPATCHES // len(draws)
  simulated = [_counted(simulate.simulate(
      make_scheduler(requests, plan, engine, max_rows, max_tokens_mixed, stop_table),
      max_dispatches, max(p.top_logprobs for p in params),
      lengths=None if are_known else lengths, lookahead=engine.lookahead),
                        plan.totals.prompt_tokens_planned, int(lengths.sum()), 1 / len(draws))
               for lengths in draws]
  shapes = list(itertools.chain(*simulated))
  is_extrapolated = max(map(len, simulated)) >= max_dispatches
  if is_only_window and not is_extrapolated and are_known and max_tokens.any():
    # The simulation is the job: where the pool holds fewer rows, no step need be wider.
    most = max(shape.num_slots for shape in shapes)
    max_rows = min(max_rows, -(-most // _ROW_MULTIPLE) * _ROW_MULTIPLE)
  num_shared = int((tree.num_rows[1:] > 1).sum()) if is_only_window else sys.maxsize
  step_secs = {kind: _step_secs(model, chip, simulated[0], kind) for kind in ("mixed", "decode")}
  if is_only_window and max_tokens.max() <= 1:  # mixed steps draw all there is
    del step_secs["decode"]
  solve = functools.partial(_solve, engine, shapes, step_secs, max_tokens_mixed, is_only_window)
  states = _states(max_rows, num_shared, num_pages, engine, available)
  _, buckets = min((solve(state, available, may_compile) for state in states
                    for may_compile in (False, True)), key=lambda solution: solution[0])
  _, cut_buckets = solve(Bucket("mixed", 0, max_rows, 0, num_pages), None)
  return dataclasses.replace(plan, buckets=buckets, prediction=_predict(
      model, chip, shapes, buckets, cut_buckets, is_extrapolated, step_secs))


def _least_tokens(params: SamplingParams) -> int:
  """Tokens that a sample draws at least, whatever the model says."""
  is_known = params.ignore_eos and not params.stop and not params.stop_token_ids
  return params.max_tokens if is_known else min(params.min_tokens, params.max_tokens)


def make_scheduler(requests: Sequence[Request], plan: Plan, engine: EngineConfig, max_rows: int,
                   max_step_tokens: int, stop_table: StopTable | None) -> Scheduler:
  """A scheduler for the window of `plan`.

  >>> request = batchjax.Request("a", [7, 8, 9])
  >>> engine = batchjax.EngineConfig(num_pages=64)
  >>> plan = batchjax.make_plan(model.config, [request], engine, batchjax.CHIPS["cpu"])
  >>> scheduler = batchjax.make_scheduler([request], plan, engine, 8, 64, None)
  >>> scheduler.next_batch().num_tokens
  3
  """
  return Scheduler(requests, plan.tree, num_pages=plan.num_pages, page_size=engine.page_size,
                   max_rows=max_rows, max_step_tokens=max_step_tokens,
                   max_decode_steps=engine.max_decode_steps, stop_table=stop_table)


def _counted(shapes: list[simulate.StepShape], prompt_tokens: int, drawn_tokens: int,
             likelihood: float) -> list[simulate.StepShape]:
  """The simulated dispatches with how many of the whole window each stands for.

  Mixed steps in proportion to the prompt tokens, decode loops to the tokens that mixed steps
  leave to draw; those of the end of the window for themselves.
  """
  head, drawn = [shape for shape in shapes if not shape.is_end], collections.Counter()
  for shape in shapes:
    drawn["end" if shape.is_end else shape.kind] += shape.num_drawn
  prompt_tokens -= sum(shape.num_prompt_tokens for shape in shapes if shape.is_end)
  mixed = max(1.0, prompt_tokens / max(sum(shape.num_prompt_tokens for shape in head), 1))
  decode = max(1.0, (drawn_tokens - drawn["end"] - mixed * drawn["mixed"]) / max(drawn["decode"], 1))
  counts = [1.0 if shape.is_end else mixed if shape.kind == "mixed" else decode for shape in shapes]
  return [dataclasses.replace(shape, count=likelihood * count)
          for shape, count in zip(shapes, counts)]


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


def _solve(engine: EngineConfig, shapes: list[simulate.StepShape],
           step_secs: dict[str, Callable[[int], float]], max_step_tokens: int, is_whole: bool,
           state: Bucket, available: Collection[tuple[Bucket, int]] | None, may_compile: bool = True
           ) -> tuple[float, tuple[Bucket, ...]]:
  """The best shapes over a state of given sizes, and the seconds that they cost.

  `available` None asks for shapes cut to this job alone. Where nothing may be compiled, the cost
  is infinite unless those that are available do. Kinds without `step_secs` never run.
  """
  num_rows = state.num_rows
  total, buckets = engine.first_compile_secs if may_compile else 0.0, []
  compile_secs = engine.compile_secs if may_compile else math.inf
  for kind, limit, most, multiple in (
      ("mixed", max(max_step_tokens, num_rows), engine.max_step_tokens, _TOKEN_MULTIPLE),
      ("decode", num_rows, num_rows, _ROW_MULTIPLE)):
    if kind not in step_secs:
      continue
    weights = collections.Counter()
    for step in shapes:
      if step.kind == kind:
        weights[min(step.num_tokens, limit)] += (
            step.count * step.num_steps * -(-step.num_tokens // limit))
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
             buckets: Sequence[Bucket], cut_buckets: Sequence[Bucket], is_extrapolated: bool,
             step_secs: dict[str, Callable[[int], float]]) -> Prediction:
  sizes_in = lambda buckets: [_padded(buckets, shape.kind, shape.num_tokens) for shape in shapes]
  secs_of = lambda sizes: sum(shape.count * shape.secs(model, chip, size)
                              for size, shape in zip(sizes, shapes))
  sizes = sizes_in(buckets)
  launched = sum(shape.count * size * shape.num_steps for size, shape in zip(sizes, shapes))
  dispatches = collections.Counter()
  for shape in shapes:
    dispatches[shape.kind] += shape.count
  secs = secs_of(sizes)
  return Prediction(
      secs=secs, ladder_secs=secs - secs_of(sizes_in(cut_buckets)),
      num_mixed=round(dispatches["mixed"]), num_decode=round(dispatches["decode"]),
      padding_waste=1 - sum(shape.count * shape.num_useful for shape in shapes) / max(launched, 1),
      peak_pages=max((shape.used_pages for shape in shapes), default=0),
      is_extrapolated=is_extrapolated,
      step_secs=tuple(step_secs[b.kind](b.num_tokens) for b in buckets))


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
