"""Named cases of shared_prefix_attention, for the tests and benchmarks of every implementation.

A case is a forest: `Node(kv_len, children)` is a shared prefix, `Row(cached, new)` a request
with `cached` KV tokens of its own and `new` query tokens. Every KV slot that nobody may
read holds NaN: the tails of pages, unused pages, and page 0, where a forgotten index points.
"""

import dataclasses
from typing import NamedTuple

import ml_dtypes
import numpy as np


class Row(NamedTuple):
  """A request: KV tokens of its own that are already cached, and new tokens (KV and q)."""

  cached: int
  new: int = 1


class Node(NamedTuple):
  """A shared prefix and what continues it."""

  kv_len: int
  children: tuple


@dataclasses.dataclass(frozen=True)
class Spec:
  """A named case.

  Attributes:
    forest: nodes and rows at the root.
    num_heads, num_kv_heads, head_dim, page_size: shapes.
    window, soft_cap: as in `shared_prefix_attention`.
    padding: unused tokens at the end of the flat axis, and unused segments.
    dtype: of q and KV.
  """

  name: str
  forest: tuple
  num_heads: int = 32
  num_kv_heads: int = 8
  head_dim: int = 128
  page_size: int = 64
  window: int | None = None
  soft_cap: float | None = None
  padding: int = 0
  dtype: str = "bfloat16"

  @property
  def scale(self) -> float:
    return self.head_dim ** -0.5


class Layout(NamedTuple):
  """Index arrays of a case.

  Attributes:
    segments: dict of i32[S], the fields of `Segments`.
    page_indices: i32[I].
    positions: i32[T].
    num_pages: pages of the pool.
    readable: bool[A, page_size], slots that hold KV; NaN belongs in all others.
  """

  segments: dict
  page_indices: np.ndarray
  positions: np.ndarray
  num_pages: int
  readable: np.ndarray


class Case(NamedTuple):
  """A case with values: `Layout` and q [T, Q, H], kv_pages [A, K, page_size, 2H]."""

  layout: Layout
  q: np.ndarray
  kv_pages: np.ndarray


def lay_out(spec: Spec, *, one_level: bool = False, seed: int = 0) -> Layout:
  """Index arrays of a spec. `one_level` folds all prefixes into the rows; pages stay shared."""
  fields = {k: [] for k in ("q_start", "q_len", "kv_start", "kv_len", "page_start")}
  page_indices, positions, filled = [], [], []

  def allocate(kv_len: int) -> list[int]:
    """Pages for `kv_len` tokens, numbered in order; they are shuffled at the end."""
    pages = []
    for begin in range(0, kv_len, spec.page_size):
      pages.append(len(filled))
      filled.append(min(spec.page_size, kv_len - begin))
    return pages

  def add(q_start, kv_start, kv_len, pages):
    values = (q_start, len(positions) - q_start, kv_start, kv_len, len(page_indices))
    for field, value in zip(fields.values(), values):
      field.append(value)
    page_indices.extend(pages)

  def walk(item, kv_start, above):
    q_start = len(positions)
    if isinstance(item, Node):
      pages = allocate(item.kv_len)
      if one_level and item.kv_len % spec.page_size:
        raise ValueError(f"{spec.name}: a prefix of {item.kv_len} tokens does not fill its pages")
      for child in item.children:
        walk(child, kv_start + item.kv_len, above + pages)
      if not one_level:
        add(q_start, kv_start, item.kv_len, pages)
    else:
      kv_len = item.cached + item.new
      positions.extend(range(kv_start + item.cached, kv_start + kv_len))
      pages = allocate(kv_len)
      if one_level:
        add(q_start, 0, kv_start + kv_len, above + pages)
      else:
        add(q_start, kv_start, kv_len, pages)

  for root in spec.forest:
    walk(root, 0, [])
  positions.extend([-1] * spec.padding)
  for field in fields.values():
    field.extend([0] * spec.padding)

  num_pages = len(filled) + 2
  order = 1 + np.random.default_rng(seed).permutation(len(filled) + 1)[:len(filled)]
  readable = np.zeros((num_pages, spec.page_size), bool)
  readable[order] = np.arange(spec.page_size) < np.asarray(filled, int).reshape(-1, 1)
  as_i32 = lambda x: np.asarray(x, np.int32)
  return Layout(segments={k: as_i32(v) for k, v in fields.items()},
                page_indices=as_i32(order[as_i32(page_indices)] if page_indices else [0]),
                positions=as_i32(positions), num_pages=num_pages, readable=readable)


def build(spec: Spec, *, one_level: bool = False, seed: int = 0) -> Case:
  """A spec with normal random values, NaN in every slot that nobody may read."""
  layout = lay_out(spec, one_level=one_level, seed=seed)
  rng = np.random.default_rng(seed + 1)
  dtype = np.float32 if spec.dtype == "float32" else ml_dtypes.bfloat16
  shape = (len(layout.positions), spec.num_heads, spec.head_dim)
  q = rng.standard_normal(shape, np.float32).astype(dtype)
  shape = (layout.num_pages, spec.num_kv_heads, spec.page_size, 2 * spec.head_dim)
  kv = rng.standard_normal(shape, np.float32)
  kv = np.where(layout.readable[:, None, :, None], kv, np.nan).astype(dtype)
  return Case(layout, q, kv)


def exact(spec: Spec, layout: Layout, q, kv_pages, tokens=None) -> tuple[np.ndarray, np.ndarray]:
  """Attention of some tokens (all where None) by its definition, in float64.

  `q` and `kv_pages` may lie on a device: only the rows and pages needed are fetched.
  Returns o [n, Q, H] and lse [n, Q].
  """
  tokens = np.arange(len(layout.positions)) if tokens is None else np.asarray(tokens)
  group = spec.num_heads // spec.num_kv_heads
  o = np.zeros((len(tokens), spec.num_heads, spec.head_dim))
  lse = np.full((len(tokens), spec.num_heads), -np.inf)
  s = layout.segments
  for n, t in enumerate(tokens):
    keys, values, where = [], [], []
    for i in np.flatnonzero((s["q_start"] <= t) & (t < s["q_start"] + s["q_len"])):
      length = int(s["kv_len"][i])
      pages = layout.page_indices[s["page_start"][i]:][:-(-length // spec.page_size)]
      kv = np.asarray(kv_pages[pages]).astype(np.float64).swapaxes(1, 2)
      kv = kv.reshape(-1, spec.num_kv_heads, 2 * spec.head_dim)[:length]
      keys.append(kv[..., :spec.head_dim])
      values.append(kv[..., spec.head_dim:])
      where.append(s["kv_start"][i] + np.arange(length))
    if not keys:
      continue
    position, here = np.concatenate(where), layout.positions[t]
    visible = position <= here
    if spec.window is not None:
      visible &= position > here - spec.window
    if not visible.any():
      continue
    k, v = np.concatenate(keys)[visible], np.concatenate(values)[visible]
    rows = np.asarray(q[t]).astype(np.float64).reshape(spec.num_kv_heads, group, spec.head_dim)
    scores = np.einsum("kgh,ckh->kgc", rows, k) * spec.scale
    if spec.soft_cap is not None:
      scores = spec.soft_cap * np.tanh(scores / spec.soft_cap)
    top = scores.max(axis=-1, keepdims=True)
    probs = np.exp(scores - top)
    total = probs.sum(axis=-1, keepdims=True)
    o[n] = np.einsum("kgc,ckh->kgh", probs / total, v).reshape(spec.num_heads, -1)
    lse[n] = (top + np.log(total)).reshape(-1)
  return o, lse


def rows(num: int, cached: int, new: int = 1) -> tuple[Row, ...]:
  return (Row(cached, new),) * num


# Small cases: seconds in an interpreter. Each covers what its name says.
_small = dict(num_heads=4, num_kv_heads=2, head_dim=64, page_size=16)
_levels = Node(40, (Node(24, (Node(9, (Row(5), Row(20))), Row(3, 4))), Row(0)))
SMALL = {s.name: s for s in (
    Spec("decode_own", (Row(70), Row(0), Row(200), Row(15)), padding=2, **_small),
    Spec("decode_page_64", (Row(70), Row(130)), 4, 2, 128, 64),
    Spec("decode_page_256", (Row(300), Row(31)), 4, 2, 64, 256),
    Spec("decode_one_kv_head", (Row(70), Row(40)), 6, 1, 64, 32),
    Spec("speculative", (Row(40, 4), Row(9, 16), Row(64, 2)), 8, 2, 64, 16),
    Spec("two_levels", (Node(48, rows(3, 10)), Node(16, rows(2, 30)), Row(12)), padding=1,
         **_small),
    Spec("prefix_in_page", (Node(37, rows(2, 10)), Node(5, rows(2, 3))), **_small),
    Spec("four_levels", (_levels,), padding=3, **_small),
    Spec("many_rows", (Node(70, rows(40, 3)),), **_small),
    Spec("prefill", (Row(0, 150),), **_small),
    Spec("prefill_cached", (Node(33, (Row(20, 70), Row(0, 40))),), **_small),
    Spec("mixed", (Node(30, (Row(10), Row(4, 3), Row(0, 50))), Row(0, 20), Row(90)), padding=5,
         **_small),
    Spec("window", (Node(80, (Row(10), Row(60, 20))), Row(0, 90)), window=33, **_small),
    Spec("soft_cap", (Node(20, (Row(30), Row(5, 4))),), soft_cap=2.0, **_small),
    Spec("split", (Row(1500), Row(900)), **_small),
)}
for _group in (1, 3, 5, 6, 7, 8, 16):
  SMALL[f"group_{_group}"] = Spec(
      f"group_{_group}", (Node(20, (Row(30), Row(5, 4), Row(0, 13))),), 2 * _group, 2, 64, 16)
for _dim in (80, 96, 128, 256):
  SMALL[f"head_dim_{_dim}"] = Spec(
      f"head_dim_{_dim}", (Node(20, (Row(70), Row(5, 4), Row(0, 40))),), 4, 2, _dim, 16)

# Real sizes: Llama-3-8B heads, and Llama-3.2-1B with head dim 64.
LARGE = {s.name: s for s in (
    Spec("decode_256x1024_p64", rows(256, 1023)),
    Spec("decode_256x1024_p128", rows(256, 1023), page_size=128),
    Spec("decode_256x4096_p64", rows(256, 4095)),
    Spec("decode_256x4096_p128", rows(256, 4095), page_size=128),
    Spec("decode_16x32768", rows(16, 32767)),
    Spec("prefix_2048x1024", (Node(2048, rows(1024, 127)),)),
    Spec("prefix_16384x1024", (Node(16384, rows(1024, 127)),)),
    Spec("own_1024x65_192", tuple(Row(64 + i % 128) for i in range(1024))),
    Spec("prefix_4032_own_65_192", (Node(4032, tuple(Row(64 + i % 128) for i in range(1024))),)),
    Spec("groups_64x16_2048", (Node(2048, rows(16, 127)),) * 64),
    Spec("prefill_8192", (Row(0, 8192),)),
    Spec("prefill_16x512_on_2048", (Row(2048, 512),) * 16),
    Spec("mixed", (Node(2048, rows(16, 127) + rows(4, 0, 512)),)
         + (Node(2048, rows(16, 127)),) * 31),
    Spec("mixed_decode", (Node(2048, rows(16, 127)),) * 32),
    Spec("mixed_chunks", (Node(2048, rows(4, 0, 512)),)),
)}
for _prefix in (32, 64, 128, 256):
  for _rows in (2, 8, 32):
    _name = f"small_{_prefix}x{_rows}"
    LARGE[_name] = Spec(
        _name, (Node(_prefix, rows(_rows, 255)),) * (512 // _rows), page_size=32)
for _name in ("decode_256x1024_p64", "decode_256x4096_p64", "decode_16x32768", "prefix_2048x1024",
              "prefix_16384x1024"):
  LARGE[_name + "_h64"] = dataclasses.replace(LARGE[_name], name=_name + "_h64", head_dim=64)
