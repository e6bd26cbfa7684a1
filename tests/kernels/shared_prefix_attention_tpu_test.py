"""The Mosaic TPU kernels: in the TPU interpreter, and through the production TPU compiler."""

import dataclasses
import functools
import importlib.util

import jax
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.shared_prefix_attention import Segments
from pallas_kernels.shared_prefix_attention import specs
from pallas_kernels.shared_prefix_attention import tpu
from pallas_kernels.shared_prefix_attention import tpu_analysis
from pallas_kernels.shared_prefix_attention import tpu_schedule
from pallas_kernels.shared_prefix_attention import tpu_write
from pallas_kernels.shared_prefix_attention.specs import Node, Row, Spec
from pallas_kernels.shared_prefix_attention.tpu_schedule import Tiling

# Small blocks: several q blocks, tiles that start late in one, steps that straddle rows.
TILING = Tiling(q=32, tile_rows=32, heads=2, tile_kv=128, row_kv=128, rows=2, ahead=2, cores=1)
INTERPRET = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")

_TWO_CORES = Spec("two_cores_f32", (Node(20, (Row(150), Row(3, 18), Row(7))),), 8, 4, 64, 16,
                  dtype="float32", padding=1)
_WINDOW = Spec("window_before_prefix", (Node(200, (Row(140), Row(4, 21), Row(60))),), 3, 1, 64, 32,
               window=50, soft_cap=4.0)
_WIDE = Spec("head_dim_256", (Node(20, (Row(30), Row(0, 3))),), 2, 1, 256, 16)


@pytest.fixture(autouse=True)
def fresh_interpreter():
  """The interpreter keeps its state, races found included, between kernels."""
  pltpu.reset_tpu_interpret_mode_state()
  yield
  pltpu.reset_tpu_interpret_mode_state()


def races_found() -> bool:
  # No public name tells what the race detector found.
  from jax._src.pallas.mosaic.interpret import interpret_pallas_call
  return interpret_pallas_call.races.races_found


def run(spec: Spec, tiling: Tiling, *, spare_lanes: int = 0, **changes):
  """(o, lse) of the kernel and by definition; the pool has `spare_lanes` of NaN behind its values."""
  case = specs.build(spec)

  def attend(segments, page_indices, positions, q, kv_pages):
    schedule = tpu.make_schedule(
        Segments(**segments), page_indices, positions, page_size=spec.page_size,
        num_heads=spec.num_heads, num_kv_heads=spec.num_kv_heads, head_dim=spec.head_dim,
        tiling=tiling, dtype=jnp.promote_types(q.dtype, kv_pages.dtype))
    return tpu.attend(q, kv_pages, schedule, scale=spec.scale, window=spec.window,
                      soft_cap=spec.soft_cap, interpret=INTERPRET)

  layout = case.layout
  kv_pages = case.kv_pages.astype(changes.get("kv_dtype", case.kv_pages.dtype))
  pool = np.pad(kv_pages, ((0, 0), (0, 0), (0, 0), (0, spare_lanes)), constant_values=np.nan)
  o, lse = jax.jit(attend)(layout.segments, layout.page_indices, layout.positions, case.q, pool)
  assert o.dtype == case.q.dtype and lse.dtype == jnp.float32
  expected = specs.exact(spec, layout, case.q, kv_pages)
  return (np.asarray(o, np.float64), np.asarray(lse)), expected


@pytest.mark.parametrize("spec, tiling", [
    (specs.SMALL["decode_own"], TILING),
    (specs.SMALL["four_levels"], TILING._replace(heads=1)),
    (dataclasses.replace(specs.SMALL["mixed"], page_size=64), TILING),
    (specs.SMALL["group_7"], TILING),
    (specs.SMALL["head_dim_80"], TILING._replace(rows=3, ahead=4)),
    (_TWO_CORES, TILING._replace(cores=2)),
    (_WINDOW, TILING._replace(q=16, heads=1)),
    (_WIDE, TILING._replace(heads=1)),
], ids=lambda x: x.name if isinstance(x, Spec) else "")
def test_equals_the_definition_without_races_or_stray_reads(spec, tiling):
  (o, lse), (expected, expected_lse) = run(spec, tiling)
  tolerance = 1e-5 if spec.dtype == "float32" else 2e-2
  np.testing.assert_allclose(o, expected, atol=tolerance)
  np.testing.assert_allclose(lse, expected_lse, atol=1e-5)
  assert not races_found()


@pytest.mark.parametrize("head_dim, spare_lanes", [(80, 96), (96, 64), (32, 64), (128, 128)])
def test_lanes_behind_the_values_are_not_read(head_dim, spare_lanes):
  spec = dataclasses.replace(specs.SMALL["head_dim_80"], head_dim=head_dim)
  (o, lse), (expected, expected_lse) = run(spec, TILING, spare_lanes=spare_lanes)
  np.testing.assert_allclose(o, expected, atol=2e-2)
  np.testing.assert_allclose(lse, expected_lse, atol=1e-5)
  assert not races_found()


def test_float32_keys_meet_bfloat16_queries():
  spec = Spec("mixed_dtypes", (Row(20), Row(2, 3)), 2, 1, 64, 16)
  (o, _), (expected, _) = run(spec, TILING._replace(heads=1), kv_dtype=np.float32)
  np.testing.assert_allclose(o, expected, atol=1e-2)


@pytest.mark.parametrize("dtype, head_dim", [(jnp.bfloat16, 64), (jnp.float32, 64),
                                             (jnp.bfloat16, 40)])
def test_write_kv_changes_its_slots_and_nothing_else(dtype, head_dim, monkeypatch):
  monkeypatch.setattr(tpu_write, "_BLOCK", 16)  # runs of a tile that go on in the next grid step
  monkeypatch.setattr(tpu_write, "_AHEAD", 2)
  slots = np.asarray([5, -1, *range(20, 49), 80, 90, -1, -1, 63, 15], np.int32)
  rng = np.random.default_rng(0)
  draw = lambda *shape: jnp.asarray(rng.standard_normal(shape, np.float32), dtype)
  pages, (k, v) = draw(6, 2, 16, 128), draw(2, len(slots), 2, head_dim)
  expected = np.array(pages)
  for token in np.flatnonzero(slots >= 0):
    page, offset = divmod(slots[token], 16)
    expected[page, :, offset, :2 * head_dim] = np.concatenate([k[token], v[token]], axis=-1)
    expected[page, :, offset, 2 * head_dim:] = 0
  write = jax.jit(functools.partial(tpu_write.write_kv, interpret=INTERPRET))
  np.testing.assert_array_equal(np.asarray(write(pages, k, v, slots)), expected)
  assert not races_found()


def random_segments(rng, num_tokens, num_levels):
  """Segments of some levels with random disjoint ranges, and positions that see some of them."""
  fields = []
  for level in range(num_levels):
    cuts = np.unique(rng.integers(0, num_tokens + 1, 8))
    for start, stop in zip(cuts[:-1], cuts[1:]):
      if rng.random() < 0.8:
        fields.append((start, stop - start, 100 * level, rng.integers(0, 100), 7 * len(fields)))
  positions = rng.integers(-1, 100 * num_levels, num_tokens).astype(np.int32)
  return Segments(*np.asarray(fields, np.int32).reshape(-1, 5).T), positions


@pytest.mark.parametrize("seed", range(5))
def test_items_are_the_segments_cut_at_q_blocks(seed):
  rng = np.random.default_rng(seed)
  segments, positions = random_segments(rng, num_tokens=150, num_levels=3)
  schedule = tpu_schedule.make_schedule(
      segments, jnp.arange(500), positions, TILING, page_size=16, max_levels=3)
  expected = []
  for start, length, kv_start, kv_len, page_start in zip(*segments):
    for block in range(5):
      low, high = max(start, block * 32), min(start + length, block * 32 + 32)
      if low < high:
        here = positions[low:high]
        end = np.clip(here.max() + 1 - kv_start, 0, kv_len)
        if end > 0:
          key = 2 * block + (high - low == 1)
          expected.append((key, low - block * 32, high - low, page_start, kv_start, end,
                           here.min(), here.max()))
  keys, items = np.asarray(schedule.keys), np.asarray(schedule.items)
  used = keys < 2 * 5
  found = np.concatenate([keys[used, None], items[used]], axis=1)
  assert sorted(map(tuple, found)) == sorted(expected)
  assert (np.diff(keys) >= 0).all()

  table, units = tpu_schedule.scalars(schedule, window=40)
  table = np.asarray(table).reshape(tpu_schedule.NUM_FIELDS, -1)
  blocks, first = table[tpu_schedule.BLOCKS], table[tpu_schedule.FIRST]
  assert int(units[-1]) == len(expected)
  for key in range(10):
    assert blocks[keys == key].sum() == units[key]
  assert (np.asarray(units[1:10:2]) % TILING.rows == 0).all()
  # What a window hides from every token of an item is whole blocks before it, and only that.
  lowest = np.maximum(items[:, tpu_schedule.LOW] - 39 - items[:, tpu_schedule.KV_START], 0)
  size = TILING.tile_kv
  reach = np.minimum(lowest, items[:, tpu_schedule.KV_END])
  assert (first[used] == reach[used] // size).all()


@pytest.mark.parametrize("generation", ["v5e", "v5p", "v6e", "tpu7x"])
@pytest.mark.parametrize("num_heads, num_kv_heads, head_dim, dtype", [
    (32, 8, 128, jnp.bfloat16), (9, 3, 64, jnp.bfloat16), (32, 32, 128, jnp.bfloat16),
    (16, 8, 256, jnp.float32), (8, 1, 128, jnp.bfloat16), (40, 8, 80, jnp.bfloat16)])
def test_default_blocks_fit_the_shapes(generation, num_heads, num_kv_heads, head_dim, dtype):
  for page_size in tpu.PAGE_SIZES:
    for num_tokens in (1, 200, 8192):
      t = tpu.default_tiling(num_tokens=num_tokens, page_size=page_size, num_heads=num_heads,
                             num_kv_heads=num_kv_heads, head_dim=head_dim, generation=generation,
                             dtype=dtype)
      rows = t.q * num_heads // num_kv_heads
      assert t.tile_rows <= rows and (rows - t.tile_rows) % 16 == 0
      assert num_kv_heads % (t.cores * t.heads) == 0
      for size in (t.tile_kv, t.row_kv):
        assert size % page_size == 0 and size % 128 == 0


def test_what_it_cannot_do_is_an_error():
  with pytest.raises(NotImplementedError, match="page sizes"):
    tpu.make_schedule(None, None, None, page_size=48, num_heads=2, num_kv_heads=1, head_dim=64)
  with pytest.raises(NotImplementedError, match="TPU v3"):
    tpu.generation_of("TPU v3")
  segments, positions = random_segments(np.random.default_rng(0), num_tokens=40, num_levels=1)
  schedule = tpu.make_schedule(segments, jnp.arange(500), positions, page_size=16, num_heads=2,
                               num_kv_heads=2, head_dim=64, tiling=TILING)
  q, kv = jnp.zeros((40, 2, 64), jnp.bfloat16), jnp.zeros((4, 2, 16, 128), jnp.bfloat16)
  with pytest.raises(ValueError, match="pages of 16"):
    tpu.attend(q, kv.reshape(2, 2, 32, 128), schedule, scale=1.0)
  with pytest.raises(NotImplementedError, match="positive scale"):
    tpu.attend(q, kv, schedule, scale=0.0)
  with pytest.raises(NotImplementedError, match="float16"):
    tpu.attend(q, kv.astype(jnp.float16), schedule, scale=1.0)


def test_reads_the_loops_that_use_the_mxu(tmp_path):
  stem = "17-shared_prefix_attention.1-"
  (tmp_path / f"{stem}72-final_bundles.txt").write_text(
      "LB: loop body\n     0   :  { %a }\n   0x1 LB: > { %b }\n   0x2   : > { %c }\n"
      "   0x3 PF: { %d }\n")
  (tmp_path / f"{stem}70-final_hlo-static-per-bundle-utilization.txt").write_text(
      "== CAPACITY:\nMXU, VALU, VLOAD, VSTORE\n    2     4     3     1\n== UTILIZATION:\n"
      "0 4 0 0\n1 4 0 1\n2 0 3 0\n0 0 0 1\n")
  assert tpu_analysis.read_loops(tmp_path) == [
      tpu_analysis.Loop(bundles=2, mxu=0.75, valu=0.5, vld=0.5, vst=0.5)]


# --- the production compiler; nothing runs ---

needs_compiler = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None,
                                    reason="libtpu, the TPU compiler, is not installed")
TOPOLOGIES = tpu_analysis.TOPOLOGIES


def compile_step(generation, *, num_tokens=256, num_segments=256, num_indices=4096, num_heads=32,
                 num_kv_heads=8, head_dim=128, page_size=64, num_pages=512, dtype=jnp.bfloat16,
                 **options):
  """Compiles a KV write and an attention on the donated pool for a device that is not there."""
  device = tpu_analysis.absent_device(generation)
  array = lambda dtype, *shape: tpu_analysis.on_device(device, jax.ShapeDtypeStruct(shape, dtype))
  ints = functools.partial(array, jnp.int32)

  def step(kv_pages, segments, page_indices, positions, q, k, v, slots):
    kv_pages = tpu_write.write_kv(kv_pages, k, v, slots)
    schedule = tpu.make_schedule(
        segments, page_indices, positions, page_size=page_size, num_heads=num_heads,
        num_kv_heads=num_kv_heads, head_dim=head_dim, dtype=dtype, generation=generation)
    return kv_pages, tpu.attend(q, kv_pages, schedule, scale=head_dim ** -0.5, **options)

  kv = array(dtype, num_tokens, num_kv_heads, head_dim)
  return jax.jit(step, donate_argnums=0).lower(
      array(dtype, num_pages, num_kv_heads, page_size, tpu.pool_width(head_dim)),
      Segments(*(ints(num_segments),) * 5), ints(num_indices), ints(num_tokens),
      array(dtype, num_tokens, num_heads, head_dim), kv, kv, ints(num_tokens)).compile()


@needs_compiler
@pytest.mark.parametrize("generation", list(TOPOLOGIES))
@pytest.mark.parametrize("head_dim", [80, 96, 128])
def test_the_pool_is_written_in_place(generation, head_dim):
  pool_bytes = 4096 * 8 * 64 * 256 * 2
  memory = compile_step(generation, num_pages=4096, head_dim=head_dim).memory_analysis()
  assert memory.alias_size_in_bytes == pool_bytes
  assert memory.temp_size_in_bytes < pool_bytes // 20


@needs_compiler
@pytest.mark.parametrize("generation", list(TOPOLOGIES))
@pytest.mark.parametrize("case", [
    dict(num_tokens=1024, num_segments=1024, num_indices=4096 * 1024, page_size=16, head_dim=64),
    dict(num_heads=9, num_kv_heads=3, head_dim=64, dtype=jnp.float32),
    dict(num_heads=14, num_kv_heads=2, head_dim=80, page_size=256),
    dict(num_heads=32, num_kv_heads=2, head_dim=96, page_size=16),
    dict(num_heads=16, num_kv_heads=8, head_dim=256, window=512, soft_cap=50.0),
    dict(num_heads=16, num_kv_heads=16), dict(num_heads=40), dict(num_heads=8, num_kv_heads=1),
], ids=["4096_pages_1024_rows", "f32", "h80_p256", "h96_p16", "h256", "mha", "ratio_5", "one_kv"])
def test_compiles(generation, case):
  compiled = compile_step(generation, **case)
  names = {"write_kv", "shared_prefix_attention"}
  assert all(name in compiled.as_text() for name in names)
