"""Compiles the steps of a model for a TPU that need not be there, and says what they cost.

    JAX_PLATFORMS=cpu python scripts/tpu_report.py --model=llama3_8b --chip=v6e

prints whether the decode loop and the mixed step fit HBM, their flops, bytes and floor; with
--kernel the attention kernel's inner loops. Needs libtpu; nothing runs.
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
_KERNEL = flags.DEFINE_bool("kernel", False, "Analyze the kernel's inner loops instead (slow).")


def compile_step(kind: str, device):
  config = dataclasses.replace(SHAPES[_MODEL.value], dtype="bfloat16")
  pages = _ROWS.value * -(-_KV_LEN.value // _PAGE_SIZE.value)
  bucket = Bucket(kind, _ROWS.value if kind == "decode" else _TOKENS.value, _ROWS.value,
                  2 * _ROWS.value, 2 * pages)
  features = SamplingFeatures()
  module = Transformer(config, _PAGE_SIZE.value, "mosaic_tpu")
  params = {"params": nn.unbox(jax.eval_shape(lambda: init_params(config, jax.random.key(0))))}
  state = jax.eval_shape(lambda: step.init_engine_state(
      init_kv_state(config, pages, _PAGE_SIZE.value), _ROWS.value, config.vocab_size, features))
  table = SamplingTable(_ROWS.value, features, config.eos_token_ids)
  arguments = (params, None, state, compile_lib.input_shapes(bucket, table, features))
  run = functools.partial(step.mixed_step, module, features)
  if kind == "decode":
    run = functools.partial(step.decode_loop, module, features, 16)
    arguments += (jax.ShapeDtypeStruct((), jnp.int32),)
  put = functools.partial(tpu_analysis.on_device, device)
  target = jax.sharding.AbstractDevice(device_kind=device.device_kind, num_cores=1, platform="tpu")
  mesh = jax.sharding.AbstractMesh((1,), ("chip",), abstract_device=target)
  with jax.sharding.use_abstract_mesh(mesh):  # tells the kernel its target
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


def main(_: list[str]) -> None:
  with tempfile.TemporaryDirectory() as folder:
    if _KERNEL.value:
      os.environ["LIBTPU_INIT_ARGS"] = tpu_analysis.dump_flags(folder)
    device = tpu_analysis.absent_device(_CHIP.value)
    print(f"{_MODEL.value} on {device.device_kind}, {_ROWS.value} rows of {_KV_LEN.value} tokens, "
          "bfloat16; static analysis, nothing ran on a TPU")
    if _KERNEL.value:
      c = SHAPES[_MODEL.value]
      print(tpu_analysis.to_text(tpu_analysis.analyze(
          _CHIP.value, device, pathlib.Path(folder), num_heads=c.num_heads,
          num_kv_heads=c.num_kv_heads, head_dim=c.head_dim, page_size=_PAGE_SIZE.value)))
    else:
      for kind in ("decode", "mixed"):
        report_step(kind, device, tpu.tuned(_CHIP.value))


if __name__ == "__main__":
  app.run(main)
