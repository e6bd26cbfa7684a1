r"""Times one workload of random tokens on this machine's device and prints one line of JSON.

    batchjax bench --config=llama3_8b --workload=prefix_groups --num_requests=1024 \
        --prefix_len=2000 --share_degree=16 --distinct_len=200 --output_len=100 --measure_ceilings

`batchjax/bench/workloads.py` says what the workloads and their flags are, `Figures` of
`batchjax/bench/bench.py` what the figures mean. Flags named like sampling parameters hold for all
requests, so that a job with one can be timed beside the same job without: --temperature=1,
--logprobs --top_logprobs=5, --presence_penalty=0.5, --stop_strings=4, and to score every prompt,
--workload=random --output_len=1 --prompt_logprobs. Any field of the configuration can be set:
--config.engine.share_prefixes=False. With --profile=DIR, two seconds of the run are
traced, and where device time went is in the line too. With --host_only nothing runs on a device and
no weights are loaded: the line has the CPU time of planning and of the host's part of a dispatch.

Exit codes: 0 done, 2 refused or failed, with one line that says why, 130 interrupted.
"""

import dataclasses
import os
import time

from absl import flags
import jax

from batchjax.bench import bench, host, roofline, trace, workload_flags
from batchjax.bench.workloads import Draw, WORKLOADS
from batchjax.commands import command_line
from batchjax.engine.device import chip_of
from batchjax.jobs.run import configure_jax
from batchjax.weights import load_config, load_model

ERRORS = (bench.BenchError, trace.TraceError)


def define_flags() -> None:
  """Those of `batchjax bench`."""
  command_line.define_config()
  workload_flags.define()
  workload_flags.define_sampling()
  flags.DEFINE_integer("seed", 0, "Of the tokens.")
  flags.DEFINE_integer("repeat", 1, "Runs; a line of JSON each.", lower_bound=1)
  flags.DEFINE_bool("measure_ceilings", False, "Measure what the device can do, and report the "
                    "floor that follows.")
  flags.DEFINE_bool("host_only", False, "Time the host alone.")
  flags.DEFINE_string("profile", None, "Folder for a trace of the last run.")
  flags.DEFINE_float("profile_after_secs", 2.0, "When the trace begins.")
  flags.DEFINE_float("profile_secs", 2.0, "How long it lasts.")


def main(args: flags.FlagValues) -> None:
  """Prints a line for each run."""
  sizes = workload_flags.sizes_of(args.workload)
  sampling = workload_flags.sampling()
  given = {"workload": args.workload, **sizes, "seed": args.seed, **workload_flags.sampling_values()}
  config = command_line.job_config(args.config)
  draw = lambda vocab_size: WORKLOADS[args.workload](
      Draw(vocab_size, args.seed, sampling), **sizes)
  if args.host_only:
    model_config = load_config(config.model)
    figures = host.run(model_config, draw(model_config.vocab_size), config.engine,
                       chip_of(jax.devices()[0]))
    print(bench.to_json(given | dataclasses.asdict(figures)))
    return
  configure_jax()
  ceilings = roofline.measure_ceilings(config.model.dtype) if args.measure_ceilings else None
  start = time.perf_counter()
  model = load_model(config.model, config.engine.mesh)
  jax.block_until_ready(model.params)
  load_secs = time.perf_counter() - start
  workload = draw(model.config.vocab_size)
  for number in range(args.repeat):
    line = {"model": (config.model.name or config.model.shape
                      or os.path.basename(config.model.path)), **given, "load_secs": load_secs}
    directory = args.profile if number == args.repeat - 1 else None
    tracer = trace.Tracer(directory, args.profile_after_secs, args.profile_secs)
    line |= dataclasses.asdict(bench.run(model, workload, config.engine, ceilings=ceilings,
                                         on_step=tracer.on_step, traceable=bool(directory)))
    tracer.close()
    if directory:
      line["profile"] = dataclasses.asdict(trace.read_profile(directory))
    print(bench.to_json(line), flush=True)
