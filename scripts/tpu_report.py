"""Compiles the steps of a model for a TPU that need not be there, and says what they cost.

    pip install "jax[tpu]"
    JAX_PLATFORMS=cpu python scripts/tpu_report.py --model=llama3_8b --chip=v6e

prints whether the decode loop and the mixed step fit HBM, their flops, bytes and floor; with
--kernel the schedule of the attention kernel's inner loops. Static analysis: nothing runs.
"""

import dataclasses
import functools
import os
import pathlib
import tempfile

from absl import app
from absl import flags
from flax import linen as nn
import jax
from jax.experimental import topologies
import jax.numpy as jnp

from batchjax.cache.kv_state import init_kv_state
from batchjax.engine import compile as compile_lib
from batchjax.engine import step
from batchjax.engine.pack import Bucket
from batchjax.engine.sampling_inputs import SamplingFeatures, SamplingTable
from batchjax.models import SHAPES, Transformer, init_params
from pallas_kernels.shared_prefix_attention import tpu
from pallas_kernels.shared_prefix_attention import tpu_analysis

_MODEL = flags.DEFINE_enum("model", "llama3_8b", sorted(SHAPES), "Shape of the model, bfloat16.")
_CHIP = flags.DEFINE_enum("chip", "v6e", sorted(tpu_analysis.TOPOLOGIES), "One chip of these.")
_ROWS = flags.DEFINE_integer("rows", 256, "Rows that decode at once.")
_TOKENS = flags.DEFINE_integer("step_tokens", 2048, "Tokens of a mixed step.")
_KV_LEN = flags.DEFINE_integer("kv_len", 256, "KV tokens of a row, for the size of the pool.")
_PAGE_SIZE = flags.DEFINE_integer("page_size", 64, "Tokens of a KV page.")
_ATTENTION = flags.DEFINE_string("attention", "mosaic_tpu", "Implementation of the attention op.")
_KERNEL = flags.DEFINE_bool("kernel", False, "Analyze the kernel's inner loops instead (slow).")


def compile_step(kind: str, device):
  config = dataclasses.replace(SHAPES[_MODEL.value], dtype="bfloat16")
  pages = _ROWS.value * -(-_KV_LEN.value // _PAGE_SIZE.value)
  bucket = Bucket(kind, _ROWS.value if kind == "decode" else _TOKENS.value, _ROWS.value,
                  2 * _ROWS.value, 2 * pages)
  features = SamplingFeatures()
  table = SamplingTable(_ROWS.value, features, config.eos_token_ids)
  module = Transformer(config, _PAGE_SIZE.value, _ATTENTION.value)
  params = {"params": nn.unbox(jax.eval_shape(lambda: init_params(config, jax.random.key(0))))}
  state = jax.eval_shape(lambda: step.init_engine_state(
      init_kv_state(config, pages, _PAGE_SIZE.value), _ROWS.value, config.vocab_size, features))
  inputs = compile_lib.input_shapes(bucket, table, features)
  arguments = (params, None, state, inputs)
  run = functools.partial(step.mixed_step, module, features)
  if kind == "decode":
    run = functools.partial(step.decode_loop, module, features, 16)
    arguments += (jax.ShapeDtypeStruct((), jnp.int32),)
  sharding = jax.sharding.SingleDeviceSharding(device)
  put = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
  target = jax.sharding.AbstractDevice(device_kind=device.device_kind, num_cores=1, platform="tpu")
  with jax.sharding.use_abstract_mesh(
      jax.sharding.AbstractMesh((1,), ("chip",), abstract_device=target)):
    return jax.jit(run, donate_argnums=2).lower(*jax.tree.map(put, arguments)).compile()


def report_step(kind: str, device, table: dict) -> None:
  try:
    compiled = compile_step(kind, device)
  except jax.errors.JaxRuntimeError as error:
    if "RESOURCE_EXHAUSTED" not in str(error):
      raise
    print(f"{kind}: does not fit: {str(error).splitlines()[0]}")
    return
  memory, cost = compiled.memory_analysis(), compiled.cost_analysis()
  gib = lambda name: getattr(memory, name + "_size_in_bytes") / 2**30
  used = gib("argument") + gib("output") + gib("temp") - gib("alias")
  flops, moved = cost["flops"], cost["bytes accessed"]
  floor = max(flops / table["bf16_flops"], moved / table["hbm_bytes_per_sec"])
  # The compiler counts one iteration of a loop, a kernel's operands whole, and not its flops.
  print(f"{kind}: {used:.2f} of {table['hbm_bytes'] / 2**30:.0f} GiB, temporary {gib('temp'):.3f}, "
        f"in place {gib('alias'):.2f}; {flops / 1e9:.0f} Gflop, {moved / 1e9:.2f} GB, "
        f"floor {floor * 1e3:.2f} ms")


def report_kernel(device, folder: str) -> None:
  c = SHAPES[_MODEL.value]
  report = tpu_analysis.analyze(
      _CHIP.value, device, pathlib.Path(folder), num_heads=c.num_heads,
      num_kv_heads=c.num_kv_heads, head_dim=c.head_dim, page_size=_PAGE_SIZE.value)
  print(report.tiling)
  for name, limit, cycles in (("tile", "MXU", report.tile_cycles),
                              ("rows", "DMA", report.dma_cycles)):
    loop = getattr(report, name)
    slots = ", ".join(f"{unit} {share:.0%}" for unit, share in loop._asdict().items() if share <= 1)
    print(f"{name}: {loop.bundles} bundles, {limit} needs {cycles:.0f} cycles; slots full: {slots}")


def main(argv: list[str]) -> None:
  del argv
  os.environ.update(tpu_analysis.ENVIRONMENT)  # read when the compiler is loaded, below
  with tempfile.TemporaryDirectory() as folder:
    if _KERNEL.value:
      os.environ["LIBTPU_INIT_ARGS"] = tpu_analysis.dump_flags(folder)
    device = topologies.get_topology_desc(
        platform="tpu", topology_name=tpu_analysis.TOPOLOGIES[_CHIP.value]).devices[0]
    print(f"{_MODEL.value} on {device.device_kind}, {_ROWS.value} rows of {_KV_LEN.value} tokens, "
          "bfloat16; static analysis, nothing ran on a TPU")
    if _KERNEL.value:
      report_kernel(device, folder)
    else:
      for kind in ("decode", "mixed"):
        report_step(kind, device, tpu.tuned(_CHIP.value))


if __name__ == "__main__":
  app.run(main)
