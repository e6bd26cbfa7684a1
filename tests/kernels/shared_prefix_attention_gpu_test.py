"""The Mosaic GPU implementation: its work list, and its kernels in the GPU interpreter.

`python -m pallas_kernels.shared_prefix_attention.bench` runs every case of `specs.SMALL`, and
the large ones, on a card.
"""

import functools

import jax
from jax.experimental.pallas import mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.shared_prefix_attention import gpu
from pallas_kernels.shared_prefix_attention import gpu_schedule
from pallas_kernels.shared_prefix_attention import Segments
from pallas_kernels.shared_prefix_attention import specs
from pallas_kernels.shared_prefix_attention.gpu_schedule import (
    HEAD, HEAD_END, HIGH, KV_END, LOW, NUM_TOKENS, OWN, SLOT, TOKEN)

pytestmark = pytest.mark.usefixtures("quick_compiler")
needs_new_jax = pytest.mark.skipif(
    jax.__version_info__ < (0, 11), reason="mosaic_gpu and its interpreter need JAX 0.11")


# Folds nothing, and whatever its children hold.
APART, FOLD_ALL = None, gpu_schedule.CostModel(10**6, 10**6)


def tiling_of(spec, num_ctas=3, **changes):
  tiling = gpu.default_tiling(page_size=spec.page_size, num_heads=spec.num_heads,
                              num_kv_heads=spec.num_kv_heads, head_dim=spec.head_dim)
  return tiling._replace(num_ctas=num_ctas, **changes)


def arrays(layout):
  segments = Segments(**{k: jnp.asarray(v) for k, v in layout.segments.items()})
  return segments, jnp.asarray(layout.page_indices), jnp.asarray(layout.positions)


# One function for all cases: those of the same shapes are compiled once.
make_schedule = jax.jit(gpu_schedule.make_schedule, static_argnames=("tiling", "max_levels"))


def schedule_of(spec, layout, num_ctas=3, max_levels=4, **changes):
  return make_schedule(*arrays(layout), tiling=tiling_of(spec, num_ctas, **changes),
                       max_levels=max_levels)


def runs_of(item):
  """Page list, first position and offsets of what an item reads: of a folded segment, and its own."""
  for columns in (HEAD, OWN):
    page_start, kv_start, begin, end = item[list(columns)]
    yield page_start, kv_start, begin, min(end, item[HIGH] + 1 - kv_start)


def pairs_of_items(schedule, layout, page_size):
  """Every (token, page slot) that the items let a token see, as a sorted list."""
  pairs = []
  items = np.asarray(schedule.items)
  for item in items[items[:, NUM_TOKENS] > 0]:
    for token in range(item[TOKEN], item[TOKEN] + item[NUM_TOKENS]):
      for page_start, kv_start, begin, end in runs_of(item):
        for offset in range(begin, end):
          if kv_start + offset <= layout.positions[token]:
            page = layout.page_indices[page_start + offset // page_size]
            pairs.append((token, int(page) * page_size + offset % page_size))
  return sorted(pairs)


def pairs_of_segments(layout, page_size):
  """The same by the definition of segments."""
  pairs, s = [], layout.segments
  for i in range(len(s["q_len"])):
    for token in range(s["q_start"][i], s["q_start"][i] + s["q_len"][i]):
      for offset in range(s["kv_len"][i]):
        if s["kv_start"][i] + offset <= layout.positions[token]:
          page = layout.page_indices[s["page_start"][i] + offset // page_size]
          pairs.append((token, int(page) * page_size + offset % page_size))
  return sorted(pairs)


@pytest.mark.parametrize("name, cost_model", [
    ("decode_own", APART), ("four_levels", APART), ("four_levels", FOLD_ALL),
    ("prefill_cached", FOLD_ALL), ("mixed", APART), ("mixed", FOLD_ALL), ("split", APART),
    ("group_5", APART)])
def test_items_hold_every_visible_pair_once(name, cost_model):
  spec = specs.SMALL[name]
  layout = specs.lay_out(spec)
  schedule = schedule_of(spec, layout, cost_model=cost_model)
  expected = pairs_of_segments(layout, spec.page_size)
  assert pairs_of_items(schedule, layout, spec.page_size) == expected

  # Kinds are apart, each by falling cost, and the positions of an item are its tokens'.
  items, ranges = np.asarray(schedule.items), np.asarray(schedule.ranges)
  assert ranges[0, 0] == 0 and ranges[1, 0] == ranges[0, 1]
  assert ranges[:, 1].sum() == (items[:, NUM_TOKENS] > 0).sum()
  for (first, num), blocks in zip(ranges, (schedule.tiling.narrow, schedule.tiling.wide)):
    mine = items[first:first + num]
    most = blocks.warpgroups // blocks.kv_sets * schedule.tiling.tokens
    assert (mine[:, NUM_TOKENS] <= most).all()
    cost = np.array([sum(max(-(-(end - begin) // blocks.kv), 0) for *_, begin, end in runs_of(item))
                     for item in mine], int)
    assert (np.diff(cost) <= 0).all() and (cost > 0).all()
    for item in mine:
      held = layout.positions[item[TOKEN]:item[TOKEN] + item[NUM_TOKENS]]
      assert (item[LOW], item[HIGH]) == (held.min(), held.max())


@pytest.mark.parametrize("seed", range(4))
def test_segments_that_are_no_tree_hold_every_pair_once_too(seed):
  rng, num_tokens, fields = np.random.default_rng(seed), 60, []
  for level in range(3):
    cuts = np.unique(rng.integers(0, num_tokens + 1, 6))
    fields += [(start, stop - start, 40 * level, rng.integers(0, 40), 5 * (3 * level + i))
               for i, (start, stop) in enumerate(zip(cuts[:-1], cuts[1:])) if rng.random() < 0.9]
  fields += [(0,) * 5] * (24 - len(fields))  # one shape for all seeds
  spec = specs.Spec("random", (), 8, 2, 64, 16)
  names = ("q_start", "q_len", "kv_start", "kv_len", "page_start")
  layout = specs.Layout(
      dict(zip(names, np.array(fields, np.int32).T)), np.arange(100, dtype=np.int32),
      rng.integers(-1, 130, num_tokens).astype(np.int32), 100, np.ones((100, 16), bool))
  schedule = schedule_of(spec, layout, cost_model=FOLD_ALL)
  assert pairs_of_items(schedule, layout, 16) == pairs_of_segments(layout, 16)


@pytest.mark.parametrize("forest, folds", [
    ((specs.Node(64, specs.rows(8, 255)),) * 3, True),  # each row is spared 56 tokens
    ((specs.Node(256, specs.rows(8, 255)),) * 3, False),  # 224 tokens
    ((specs.Node(256, specs.rows(2, 255)),), True),  # 128 tokens
    ((specs.Node(2000, specs.rows(16, 0, 200)),), True),  # 7 tiles a row, 6.25 if they shared them
    ((specs.Node(16_000, specs.rows(16, 0, 65)),), False),  # 3 tiles a row, 2.03
    ((specs.Node(64, specs.rows(2, 255) + (specs.Row(-1),)),), False),  # a row without own KV
])
def test_the_cost_model_decides_what_is_folded(forest, folds):
  spec = specs.Spec("fold", forest, page_size=32)
  layout = specs.lay_out(spec)
  schedule = schedule_of(spec, layout)
  items = np.asarray(schedule.items)
  items = items[items[:, NUM_TOKENS] > 0]
  assert (items[:, HEAD_END] > 0).tolist() == [folds] * len(items)


def test_a_segment_keeps_tiles_for_the_children_of_one_kind():
  # Chunks read the prefix themselves, the rows that decode share its tile.
  spec = specs.Spec("kinds", (specs.Node(1024, specs.rows(16, 127) + specs.rows(2, 0, 128)),))
  layout = specs.lay_out(spec)
  schedule = schedule_of(spec, layout, num_ctas=1)
  items = np.asarray(schedule.items)
  items = items[items[:, NUM_TOKENS] > 0]
  assert (items[:, HEAD_END] > 0).sum() == 2 * 4
  (shared,) = items[items[:, KV_END] == 1024]
  assert shared[TOKEN] == 0 and shared[NUM_TOKENS] == 16
  assert pairs_of_items(schedule, layout, spec.page_size) == pairs_of_segments(layout, spec.page_size)
  # Rows on both sides of a chunk are no range of tokens.
  forest = (specs.Node(1024, specs.rows(4, 127) + specs.rows(1, 0, 128) + specs.rows(4, 127)),)
  layout = specs.lay_out(specs.Spec("sides", forest))
  assert not np.asarray(schedule_of(spec, layout).items)[:, HEAD_END].any()


def test_of_nested_segments_the_lower_is_folded():
  forest = (specs.Node(48, (specs.Node(64, specs.rows(4, 30)),
                            specs.Node(32, specs.rows(4, 30)))),)
  spec = specs.Spec("nested", forest, 4, 2, 64, 16)
  layout = specs.lay_out(spec)
  schedule = schedule_of(spec, layout)
  items = np.asarray(schedule.items)
  heads = items[items[:, HEAD_END] > 0][:, HEAD_END]
  assert sorted(heads) == [32] * 4 + [64] * 4
  assert pairs_of_items(schedule, layout, 16) == pairs_of_segments(layout, 16)


def test_every_second_level_of_a_deep_tree_is_folded():
  tree = specs.Row(5)
  for _ in range(7):
    tree = specs.Node(10, (tree, specs.Row(3)))
  spec = specs.Spec("deep", (tree,), 4, 2, 64, 16)
  layout = specs.lay_out(spec)
  schedule = schedule_of(spec, layout, max_levels=8)
  assert pairs_of_items(schedule, layout, 16) == pairs_of_segments(layout, 16)
  assert (np.asarray(schedule.items)[:, HEAD_END] > 0).sum() == 8  # four nodes, two children each


@pytest.mark.parametrize("name", ["decode_own", "four_levels", "prefill_cached", "mixed", "split"])
def test_merge_reads_the_slots_of_each_token(name):
  spec = specs.SMALL[name]
  layout = specs.lay_out(spec)
  schedule = schedule_of(spec, layout)
  tiling, merge = schedule.tiling, jax.tree.map(np.asarray, schedule.merge)
  parts = {t: [] for t in range(len(layout.positions))}
  for i, item in enumerate(np.asarray(schedule.items)):
    for local in range(item[NUM_TOKENS]):
      row = local // tiling.tokens * 64 + local % tiling.tokens * tiling.group
      slot = item[SLOT] + local if item[SLOT] >= 0 else -1
      parts[item[TOKEN] + local].append((slot, i * tiling.item_rows + row))
  slots = [slot for p in parts.values() for slot, _ in p if slot >= 0]
  assert len(set(slots)) == len(slots) and all(s < len(merge.slots) for s in slots)
  todo = set(merge.tokens[:merge.num_tokens[0]].tolist())
  for token, mine in parts.items():
    got = slice(merge.starts[token], merge.starts[token + 1])
    if len(mine) == 1 and mine[0][0] < 0:
      assert token not in todo and merge.direct_row[token] == mine[0][1]
    else:  # also where nothing covers the token: the merge writes its zeros
      assert token in todo and merge.direct_row[token] == -1
      assert sorted(zip(merge.slots[got], merge.lse_rows[got])) == sorted(mine)


def test_long_rows_are_split_until_the_card_is_full():
  spec = specs.Spec("one", (specs.Row(40_000),), 4, 2, 64, 64)
  num = int(schedule_of(spec, specs.lay_out(spec), num_ctas=132).ranges[0, 1])
  assert 24 <= num <= 32  # the most splits of a row
  spec = specs.Spec("full", specs.rows(66 * 8, 500), 4, 2, 64, 64)
  assert int(schedule_of(spec, specs.lay_out(spec), num_ctas=132).ranges[0, 1]) == 66 * 8


def test_last_round_is_split_when_it_is_short():
  rows = specs.rows(10, 2000)  # 10 works on 4 CTAs: the last round of 2 is cut in halves
  spec = specs.Spec("tail", rows, 3, 1, 64, 64)
  layout = specs.lay_out(spec)
  schedule = schedule_of(spec, layout, num_ctas=4)
  assert int(schedule.ranges[0, 1]) == 12
  assert pairs_of_items(schedule, layout, 64) == pairs_of_segments(layout, 64)


def test_advance_serves_a_decode_loop():
  spec = specs.Spec("loop", (specs.Node(20, specs.rows(3, 13, 1)), specs.Row(70)), 4, 2, 64, 16)
  layout = specs.lay_out(spec)
  schedule = schedule_of(spec, layout)
  for back in (3, 1, 0):
    now = layout._replace(positions=layout.positions - back)
    moved = jax.jit(gpu_schedule.advance)(schedule, jnp.asarray(now.positions))
    assert pairs_of_items(moved, now, spec.page_size) == pairs_of_segments(now, spec.page_size)
    rows = np.asarray(moved.row_positions)[:len(now.positions) * 2].reshape(-1, 2)
    assert (rows == now.positions[:, None]).all()


def test_unsupported_cases_say_why():
  shapes = dict(head_dim=64, page_size=16, num_heads=4, num_kv_heads=2, q_dtype=jnp.bfloat16,
                kv_dtype=jnp.bfloat16)
  if jax.__version_info__ < (0, 11):
    assert "JAX 0.11" in gpu.why_not(**shapes)
    return
  assert gpu.why_not(**shapes) is None
  for change, word in ((dict(q_dtype=jnp.float32), "float32"), (dict(head_dim=72), "72"),
                       (dict(page_size=24), "24"), (dict(num_heads=130), "65")):
    assert word in gpu.why_not(**(shapes | change))
  assert "needs a GPU" in gpu.why_not_on(jax.devices("cpu")[0])
  layout = specs.lay_out(specs.SMALL["decode_own"])
  with pytest.raises(NotImplementedError, match="page sizes"):
    gpu.make_schedule(*arrays(layout), page_size=24, num_heads=4, num_kv_heads=2, head_dim=64)
  spec = specs.SMALL["decode_own"]
  case = specs.build(spec)
  wide = np.pad(case.kv_pages, ((0, 0), (0, 0), (0, 0), (0, 128)))
  with pytest.raises(ValueError, match="width 128, got 256"):
    gpu.attend(case.q, wide, schedule_of(spec, case.layout), scale=1.0)


def test_large_cases_measure_what_they_name():
  layout = specs.lay_out(specs.LARGE["groups_64x16_2048"])
  assert len(layout.positions) == 1024 and (layout.segments["kv_len"] == 2048).sum() == 64
  flat = specs.lay_out(specs.LARGE["groups_64x16_2048"], one_level=True)
  assert (flat.segments["kv_len"] == 2048 + 128).all() and flat.num_pages == layout.num_pages
  assert (flat.readable == layout.readable).all() and not layout.readable[0].any()


def run(spec, num_ctas=2, races=True, **changes):
  case = specs.build(spec)
  schedule = schedule_of(spec, case.layout, num_ctas, **changes)
  out = gpu.attend(jnp.asarray(case.q), jnp.asarray(case.kv_pages), schedule, scale=spec.scale,
                   window=spec.window, soft_cap=spec.soft_cap,
                   interpret=plgpu.InterpretGPUParams(detect_races=races))
  o, lse = (np.asarray(x, np.float64) for x in out)
  exact_o, exact_lse = specs.exact(spec, case.layout, case.q, case.kv_pages)
  np.testing.assert_array_equal(np.isneginf(lse), np.isneginf(exact_lse))
  seen = np.isfinite(exact_lse)
  np.testing.assert_allclose(lse[seen], exact_lse[seen], atol=1e-4)
  # bfloat16 weights and output: 2^-9 of each, relative to the norm of a row.
  error = np.linalg.norm(o - exact_o, axis=-1)
  assert (error <= 8e-3 * np.linalg.norm(exact_o, axis=-1)).all(), error.max()


# One case for each path: narrow and wide tiles with partial results of several levels and
# padding; a window and a cap; a split row; rows of a token that leave one by one; groups
# whose tokens do not fill a tile; warpgroups that take KV heads apart, and one alone; full tiles
# of a prefix, whose partial results go straight to memory.
_tiny = dict(num_heads=2, num_kv_heads=1, head_dim=64, page_size=16)
INTERPRETED = {s.name: s for s in (
    specs.SMALL["four_levels"],
    specs.Spec("wide", (specs.Node(37, (specs.Row(10), specs.Row(4, 40))),), padding=2, **_tiny),
    specs.Spec("window", (specs.Node(150, (specs.Row(10), specs.Row(60, 2))),), window=33,
               soft_cap=2.0, **_tiny),
    specs.Spec("split", (specs.Row(1300),), **_tiny),
    specs.Spec("folded_wide", (specs.Node(37, (specs.Row(4, 70), specs.Row(0, 33))),), **_tiny),
    specs.Spec("odd_pairs", (specs.Row(30), specs.Row(20)), 6, 2, 64, 16),
    specs.Spec("odd", (specs.Node(20, (specs.Row(30, 2), specs.Row(0))),), 3, 1, 80, 32),
)}


@needs_new_jax
@pytest.mark.parametrize("name", list(INTERPRETED))
def test_kernels_give_the_definition(name):
  run(INTERPRETED[name], cost_model=APART)


@needs_new_jax
@pytest.mark.parametrize("name", ["four_levels", "window", "folded_wide"])
def test_kernels_read_folded_segments(name):
  run(INTERPRETED[name], cost_model=FOLD_ALL)


@needs_new_jax
@pytest.mark.parametrize("name", ["wide", "folded_wide"])
def test_two_warpgroups_take_turns(name):
  run(INTERPRETED[name], cost_model=FOLD_ALL, wide=gpu.Blocks(2, 1, 128, 2, 2))


@needs_new_jax
@pytest.mark.parametrize("name", ["mixed", "window", "group_7", "head_dim_80", "head_dim_256",
                                  "decode_page_256"])
def test_kernels_lower_for_the_card(name):
  spec = specs.SMALL[name]
  layout = specs.lay_out(spec)
  schedule = jax.eval_shape(functools.partial(
      gpu.make_schedule, page_size=spec.page_size, num_heads=spec.num_heads,
      num_kv_heads=spec.num_kv_heads, head_dim=spec.head_dim), *arrays(layout))
  q = jax.ShapeDtypeStruct((len(layout.positions), spec.num_heads, spec.head_dim), jnp.bfloat16)
  kv = jax.ShapeDtypeStruct(
      (layout.num_pages, spec.num_kv_heads, spec.page_size, 2 * spec.head_dim), jnp.bfloat16)
  attend = jax.jit(functools.partial(gpu.attend, scale=spec.scale, window=spec.window))
  text = attend.trace(q, kv, schedule).lower(lowering_platforms=("cuda",)).as_text()
  wide = len(layout.positions) > schedule.tiling.tokens
  assert text.count("custom_call @mosaic_gpu") == 2 + wide
  # Output, partial results and log-sum-exp are written in place.
  assert "output_operand_alias" in text
