"""Plans a workload for one device of a TPU that need not be there, and compiles its steps.

    JAX_PLATFORMS=cpu batchjax tpu-report --config=llama3_2_1b --chip=v6e --workload=samples

Prints for every shape of the plan whether it fits the memory, its flops, bytes and floor, and the
seconds that the workload takes at least; with --kernel the attention kernel's inner loops. Needs
libtpu; nothing runs. A tpu7x chip is two devices: this is about one of them.

Exit codes: 0 done, 2 refused or failed, with one line that says why, 130 interrupted.
"""

import dataclasses
import os
import pathlib
import tempfile

from absl import flags
import jax

from batchjax.bench import workload_flags
from batchjax.bench.workloads import Draw, WORKLOADS
from batchjax.commands import command_line
from batchjax.config import ConfigError
from batchjax.engine.absent import compile_absent
from batchjax.engine.sampling_inputs import SamplingFeatures
from batchjax.plan import memory, planner
from batchjax.plan.cost import CHIPS
from batchjax.weights import load_config
from pallas_kernels.shared_prefix_attention import tpu
from pallas_kernels.shared_prefix_attention import tpu_analysis


def define_flags() -> None:
  """Those of `batchjax tpu-report`."""
  command_line.define_config()
  flags.DEFINE_enum("chip", "v6e", sorted(tpu_analysis.TOPOLOGIES), "A device of these.")
  workload_flags.define()
  flags.DEFINE_bool("kernel", False, "Analyze the kernel's inner loops instead (slow).")


def report_bucket(bucket, chip, *args) -> None:
  name = f"{bucket.kind} {bucket.num_tokens}"
  try:
    compiled = compile_absent(bucket, *args)
  except jax.errors.JaxRuntimeError as error:
    if "RESOURCE_EXHAUSTED" not in str(error):
      raise
    print(f"{name}: does not fit: {str(error).splitlines()[0]}", flush=True)
    return
  stats, cost = compiled.memory_analysis(), compiled.cost_analysis()
  gib = lambda field: getattr(stats, field + "_size_in_bytes") / 2**30
  used = gib("argument") + gib("output") + gib("temp") - gib("alias")
  flops, moved = cost["flops"], cost["bytes accessed"]
  floor = max(flops / chip.bf16_flops, moved / chip.hbm_bytes_per_sec)
  # The compiler counts one iteration of a loop, a kernel's operands whole, and not its flops.
  print(f"{name}: {used:.2f} of {chip.hbm_bytes / 2**30:.0f} GiB, temporary {gib('temp'):.3f}, "
        f"in place {gib('alias'):.2f}; {flops / 1e9:.0f} Gflop, {moved / 1e9:.2f} GB, "
        f"floor {floor * 1e3:.2f} ms", flush=True)


def main(args: flags.FlagValues) -> None:
  """Prints the report."""
  with tempfile.TemporaryDirectory() as folder:
    if args.kernel:
      os.environ["LIBTPU_INIT_ARGS"] = tpu_analysis.dump_flags(folder)
    device = tpu_analysis.absent_device(args.chip)
    job = command_line.job_config(args.config)
    config = dataclasses.replace(load_config(job.model), dtype="bfloat16")
    print(f"{config.family}, {config.num_params / 1e9:.2f}e9 parameters, bfloat16, on "
          f"{device.device_kind}; static analysis, nothing ran on a TPU", flush=True)
    if args.kernel:
      print(tpu_analysis.to_text(tpu_analysis.analyze(
          args.chip, device, pathlib.Path(folder), num_heads=config.num_heads,
          num_kv_heads=config.num_kv_heads, head_dim=config.head_dim,
          page_size=job.engine.page_size)))
      return
    rates = {name: tpu.tuned(args.chip)[name] for name in (
        "bf16_flops", "hbm_bytes_per_sec", "hbm_bytes")}
    chip = dataclasses.replace(CHIPS[args.chip], **rates)
    try:
      engine = memory.settle(config, job.engine, chip, int(memory.DEVICE_SHARE * chip.hbm_bytes))
    except ConfigError as error:
      print(f"does not fit: {error}")
      return
    requests = WORKLOADS[args.workload](
        Draw(config.vocab_size), **workload_flags.sizes_of(args.workload)).requests
    plan = planner.make_plan(config, requests, engine, chip)
    features = SamplingFeatures.of((r.sampling_params for r in requests), config.eos_token_ids)
    print(f"{plan.num_pages:,} pages of {engine.page_size} tokens; at least "
          f"{plan.prediction.secs:.2f} s, {plan.prediction.padding_waste:.1%} padding", flush=True)
    for bucket in plan.buckets:
      report_bucket(bucket, chip, plan, config, engine, features, device, "mosaic_tpu")
