"""Static analysis of the TPU kernel: VLIW bundles of its inner loops, against the page DMA.

The production TPU compiler runs without a TPU and writes the final bundles of a kernel. One
bundle is one cycle when nothing stalls; DMA waits are not in it. Nothing here ran on a TPU.
"""

import os
import pathlib
import re
import typing

import jax
from jax.experimental import topologies
import jax.numpy as jnp

from pallas_kernels.shared_prefix_attention import Segments
from pallas_kernels.shared_prefix_attention import tpu

TOPOLOGIES = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}
# Keeps the compiler from looking for a TPU or for other processes that use one.
ENVIRONMENT = dict(TPU_SKIP_MDS_QUERY="1", ALLOW_MULTIPLE_LIBTPU_LOAD="1",
                   TPU_WORKER_HOSTNAMES="localhost", TPU_ACCELERATOR_TYPE="v5litepod-4")

_BUNDLE = re.compile(r" *(?:0x[0-9a-f]+|\d+) *(LH|LB|LE|PB|PF|CT)?: *(>*) *\{")


class Loop(typing.NamedTuple):
  """A straight run of bundles that uses the MXU.

  Attributes:
    bundles: its length.
    mxu, valu, vld, vst: share of the slots of that unit which hold an instruction.
  """

  bundles: int
  mxu: float
  valu: float
  vld: float
  vst: float


class Report(typing.NamedTuple):
  """The inner loops of a kernel.

  Attributes:
    tiling: block sizes.
    tile: one unit of a tile against one product's rows, all its `tiling.heads` heads.
    tile_hidden: the same where a mask is needed.
    rows: one step of the row loop, `tiling.rows` units.
    tile_cycles: what the products of `tile` take on a full MXU.
    dma_cycles: what the pages of one row step take at the HBM rate.
  """

  tiling: tpu.Tiling
  tile: Loop
  tile_hidden: Loop
  rows: Loop
  tile_cycles: float
  dma_cycles: float


def absent_device(generation: str):
  """A device of a generation to compile for; loads the compiler."""
  os.environ.update(ENVIRONMENT)
  return topologies.get_topology_desc(
      platform="tpu", topology_name=TOPOLOGIES[generation]).devices[0]


def on_device(device, x) -> jax.ShapeDtypeStruct:
  """The shape and dtype of `x`, placed on a device that may not be there."""
  return jax.ShapeDtypeStruct(x.shape, x.dtype,
                              sharding=jax.sharding.SingleDeviceSharding(device))


def dump_flags(folder: str) -> str:
  """LIBTPU_INIT_ARGS that write the bundles of every kernel into a folder."""
  return f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true"


def analyze(generation: str, device, folder: pathlib.Path, *, num_heads: int, num_kv_heads: int,
            head_dim: int, page_size: int = 64, num_tokens: int = 1024) -> Report:
  """Compiles the kernel for a device that may not be there, and reads its bundles.

  Args:
    generation: of `tpu.tuned`.
    device: of a topology description.
    folder: where `dump_flags` points; must hold no other dump of this kernel.
  """
  array = lambda dtype, *shape: on_device(device, jax.ShapeDtypeStruct(shape, dtype))
  ints = lambda *shape: array(jnp.int32, *shape)
  tiling = tpu.default_tiling(num_tokens=num_tokens, page_size=page_size, num_heads=num_heads,
                              num_kv_heads=num_kv_heads, head_dim=head_dim, generation=generation)

  def step(segments, page_indices, positions, q, kv_pages):
    schedule = tpu.make_schedule(
        segments, page_indices, positions, page_size=page_size, num_heads=num_heads,
        num_kv_heads=num_kv_heads, head_dim=head_dim, tiling=tiling)
    return tpu.attend(q, kv_pages, schedule, scale=head_dim ** -0.5)


  jax.jit(step).lower(
      Segments(*(ints(num_tokens),) * 5), ints(64 * num_tokens), ints(num_tokens),
      array(jnp.bfloat16, num_tokens, num_heads, head_dim),
      array(jnp.bfloat16, 4096, num_kv_heads, page_size, tpu.pool_width(head_dim))).compile()
  loops = read_loops(folder)
  if len(loops) != 3:
    raise ValueError(f"expected a tile loop, its masked twin and a row step, found {len(loops)}")

  table = tpu.tuned(generation)
  clock = table["clock_hz"]
  width = -(-head_dim // 128) * 128
  flops = 4 * tiling.heads * tiling.tile_rows * tiling.tile_kv * width
  step_bytes = tiling.rows * tiling.row_kv * num_kv_heads * tpu.pool_width(head_dim) * 2
  return Report(tiling, *loops,
                tile_cycles=flops / (table["bf16_flops"] / table["cores"] / clock),
                dma_cycles=step_bytes / table["hbm_bytes_per_sec"] * clock)


def to_text(report: Report) -> str:
  """A line for the block sizes, the tile loop and the row step."""
  lines = [str(report.tiling)]
  for name, limit, cycles in (("tile", "MXU", report.tile_cycles),
                              ("rows", "DMA", report.dma_cycles)):
    bundles, *slots = getattr(report, name)
    full = ", ".join(f"{unit} {share:.0%}" for unit, share in zip(Loop._fields[1:], slots))
    lines.append(f"{name}: {bundles} bundles, {limit} needs {cycles:.0f} cycles; full: {full}")
  return "\n".join(lines)


def read_loops(folder: pathlib.Path) -> list[Loop]:
  """The runs of bundles that use the MXU, in program order, of the one kernel in a dump."""
  [bundles] = [path for path in folder.glob("*shared_prefix_attention*-final_bundles.txt")
               if "schedule-analysis" not in path.name]
  stem = bundles.name.rsplit("-", 2)[0]
  [slots] = folder.glob(stem + "-*-final_hlo-static-per-bundle-utilization.txt")
  lines = slots.read_text().splitlines()
  names = [name.strip() for name in lines[1].split(",")]
  capacity, *used = [list(map(int, line.split())) for line in lines[2:] if line[:1] != "="]

  runs, at = [], 0
  for line in bundles.read_text().splitlines():
    if match := _BUNDLE.match(line):
      if match[1] in ("LB", "PF", "PB", "LE", "CT") or not runs:
        runs.append([])
      runs[-1].append(used[at])
      at += 1
  loops = []
  for run in runs:
    totals = dict(zip(names, map(sum, zip(*run))))
    if totals["MXU"]:
      share = {n: totals[n] / (len(run) * c) for n, c in zip(names, capacity)}
      loops.append(Loop(len(run), share["MXU"], share["VALU"], share["VLOAD"], share["VSTORE"]))
  return loops
