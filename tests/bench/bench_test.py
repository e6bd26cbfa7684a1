"""The figures of a run from made-up events, the floor against closed forms, the script."""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from batchjax.bench import bench, roofline
from batchjax.bench.workloads import Draw, multi_level, prefix_groups, random, samples
from batchjax.config import EngineConfig, from_config_dict, JobConfig
from batchjax.engine.compile import CompileRecord
from batchjax.generation import StartEvent, StepEvent
from batchjax.models import SHAPES
from batchjax.plan import planner
from batchjax.plan.batch import Batch, Samples, SchedulerStats
from batchjax.plan.buckets import Bucket
from batchjax.plan.cost import CHIPS
from batchjax.plan.simulate import simulate
from batchjax.types import Choice, Completion, SamplingParams
from batchjax.weights import load_config, Model

ROOT = pathlib.Path(__file__).parents[2]
CONFIG = SHAPES["tiny_llama"]
ENGINE = EngineConfig(max_rows=8, max_step_tokens=40, page_size=8, num_pages=400,
                      max_decode_steps=4)
CEILINGS = dataclasses.replace(CHIPS["cpu"], bf16_flops=1e6, f32_flops=1e6, hbm_bytes_per_sec=1e3,
                               step_overhead_secs=0.0)
VOCAB = 1 << 20  # so large that nothing is shared by chance


# -- the floor of dispatches -----------------------------------------------------


def batches(workload, engine=ENGINE) -> list[tuple[Batch, np.ndarray]]:
  """What the engine would dispatch, floors being taken at once: rows change afterwards."""
  plan = planner.make_plan(CONFIG, workload.requests, engine, CHIPS["cpu"], buckets=())
  scheduler = planner.make_scheduler(workload.requests, plan, engine, engine.max_rows,
                                     engine.max_step_tokens, None)
  next_batch, floors = scheduler.next_batch, []

  def recorded():
    batch = next_batch()
    flops_bound = dataclasses.replace(CEILINGS, hbm_bytes_per_sec=1e30, f32_flops=1.0)
    bytes_bound = dataclasses.replace(CEILINGS, f32_flops=1e30, hbm_bytes_per_sec=1.0)
    floors.append((batch, np.array([roofline.dispatch_floor_secs(batch, CONFIG, flops_bound),
                                    roofline.dispatch_floor_secs(batch, CONFIG, bytes_bound)])))
    return batch

  scheduler.next_batch = recorded
  simulate(scheduler, 1000)
  assert scheduler.finished
  return floors


def flops(num_tokens, num_sampled, attn_pairs) -> float:
  unembedding = CONFIG.hidden_size * CONFIG.vocab_size
  return (2 * num_tokens * (CONFIG.num_params - 2 * unembedding) + 2 * num_sampled * unembedding
          + 4 * attn_pairs * CONFIG.num_heads * CONFIG.head_dim * CONFIG.num_layers)


def triangle(begin: int, end: int) -> int:
  """(query, key) pairs of positions begin to end - 1: each sees all up to itself."""
  return sum(range(begin + 1, end + 1))


@pytest.mark.parametrize("share", [True, False])
def test_floor_of_prefix_groups_is_exact(share):
  sizes = dict(num_requests=20, prefix_len=50, share_degree=5, distinct_len=7, output_len=9)
  engine = dataclasses.replace(ENGINE, share_prefixes=share)
  floors = batches(prefix_groups(Draw(VOCAB), **sizes), engine)
  num_prefixes = 4 if share else 20
  # The last token drawn is never fed in.
  tokens = num_prefixes * 50 + 20 * (7 + 8)
  pairs = num_prefixes * triangle(0, 50) + 20 * triangle(50, 65)
  assert sum(f[0] for _, f in floors) == pytest.approx(flops(tokens, 20 * 9, pairs), rel=1e-12)
  assert {batch.kind for batch, _ in floors} == {"mixed", "decode"}


def test_floor_of_two_levels_and_of_samples_is_exact():
  two_levels = multi_level(Draw(VOCAB), num_documents=2, questions_per_document=3, system_len=30,
                           document_len=25, question_len=11, output_len=6)
  pairs = triangle(0, 30) + 2 * triangle(30, 55) + 6 * triangle(55, 71)
  assert sum(f[0] for _, f in batches(two_levels)) == pytest.approx(
      flops(30 + 2 * 25 + 6 * 16, 36, pairs), rel=1e-12)
  same_prompt = samples(Draw(VOCAB), num_prompts=2, prompt_len=24, num_samples=3, output_len=6)
  recomputed = sum(b.num_prompt_tokens for b, _ in batches(same_prompt)) - 48
  assert recomputed == 0
  assert sum(f[0] for _, f in batches(same_prompt)) == pytest.approx(
      flops(48 + 6 * 5, 36, 2 * triangle(0, 24) + 6 * triangle(24, 29)), rel=1e-12)


def test_floor_counts_the_logits_of_scored_prompts():
  scored = SamplingParams(temperature=0.0, prompt_logprobs=True)
  workload = prefix_groups(Draw(VOCAB, sampling=scored), num_requests=6, prefix_len=30, share_degree=3,
                           distinct_len=7, output_len=1)
  # Every prompt token but the first has a log-probability, and every prompt's last token draws; the
  # last token of a prefix scores the next one of each request, on its own entry again.
  floors = batches(workload)
  num_scored = sum(len(s.next_tokens) for batch, _ in floors for s in batch.prompt_scores)
  assert num_scored == 2 * 29 + 6 * 7
  requeried = sum(int(batch.entries.num_requeried.sum()) for batch, _ in floors)
  tokens, pairs = 2 * 30 + 6 * 7, 2 * triangle(0, 30) + 6 * triangle(30, 37)
  assert sum(f[0] for _, f in floors) == pytest.approx(
      flops(tokens + requeried, num_scored + 6, pairs + 30 * requeried), rel=1e-12)


def test_floor_reads_shared_kv_once_per_step():
  shared = prefix_groups(Draw(VOCAB), num_requests=4, prefix_len=64, share_degree=4,
                         distinct_len=8, output_len=5)
  (mixed, _), *_ = floors = batches(shared, dataclasses.replace(ENGINE, max_step_tokens=128))
  assert [batch.kind for batch, _ in floors] == ["mixed", "decode"]
  assert mixed.num_tokens == 64 + 4 * 8
  weights = 4 * (CONFIG.num_params - CONFIG.hidden_size * CONFIG.vocab_size)
  # Iteration i reads the prefix once and 8 + 1 + i own tokens of each row, and writes one each.
  expected = sum(weights + 4 * 4 * CONFIG.hidden_size
                 + CONFIG.kv_bytes_per_token(1) * (64 + 4 * (9 + i) + 4) for i in range(4))
  assert floors[1][1][1] == pytest.approx(expected, rel=1e-12)


def with_tokens_left(batch, left):
  samples = dataclasses.replace(batch.samples, num_generated=batch.samples.max_tokens - left)
  return dataclasses.replace(batch, samples=samples)


def test_floor_of_a_decode_loop_leaves_out_rows_that_ended():
  batch, floor = batches(random(Draw(VOCAB), num_requests=3, prompt_len=10, output_len=5))[-1]
  assert batch.kind == "decode" and batch.num_steps == 4
  ended = with_tokens_left(batch, [4, 1, 1])
  less = roofline.dispatch_floor_secs(ended, CONFIG, dataclasses.replace(
      CEILINGS, hbm_bytes_per_sec=1e30, f32_flops=1.0))
  # Two rows leave after the first of four steps: their tokens at positions 11, 12 and 13 go.
  assert floor[0] - less == pytest.approx(2 * flops(3, 3, triangle(11, 14)), rel=1e-9)
  none_left = with_tokens_left(batch, [0, 0, 0])
  assert roofline.dispatch_floor_secs(none_left, CONFIG, CEILINGS) == 0.0


# -- figures ---------------------------------------------------------------------


def made_up_run(workload, tokens_per_row):
  """A `generate` whose events are known."""
  plan = planner.make_plan(CONFIG, workload.requests, ENGINE, CHIPS["cpu"], buckets=())

  def event(kind, num_rows, num_steps, num_tokens, bucket_tokens, prompt, drawn, secs, pages=0,
            preempted=0):
    zeros = np.zeros(num_rows, int)
    batch = dataclasses.replace(
        Batch.empty(kind), tokens=np.zeros(num_tokens, int), num_steps=num_steps,
        samples=Samples(*[zeros] * 5, zeros > 0, zeros), num_prompt_tokens=prompt,
        stats=SchedulerStats(pages, 0, 0, preempted))
    return StepEvent(batch, Bucket(kind, bucket_tokens, 8, 8, 400), 0, drawn, 0.25 * secs, secs,
                     0.5 * secs, (), lambda: None)

  def generate(model, requests, engine, *, observe, stop_table, compiler_options):
    observe(CompileRecord("mixed 64", read_secs=3.0, cached=True))
    observe(CompileRecord("decode 8", lower_secs=1.5, compile_secs=4.0))
    observe(StartEvent(1.0, 5.0, 0.5, {}))
    observe(plan)
    observe(event("mixed", 3, 1, 60, 64, 60, 3, 0.5, pages=100))
    observe(event("decode", 3, 4, 3, 8, 0, 12, 0.8, pages=200))
    observe(event("decode", 2, 4, 2, 8, 0, 2, 9.0, preempted=1))
    observe(plan)
    observe(event("decode", 3, 2, 3, 8, 0, 6, 0.2, preempted=2))
    for request in requests:
      choice = Choice(0, np.zeros(tokens_per_row, np.int32), "length")
      yield Completion(request.request_id, (choice,), 10, 0)

  return generate


def test_figures_of_known_events(monkeypatch):
  workload = random(Draw(VOCAB), num_requests=3, prompt_len=10, output_len=7)
  monkeypatch.setattr(bench, "generate", made_up_run(workload, 7))
  secs = []
  got = bench.run(Model(CONFIG, {}), workload, ENGINE, on_step=secs.append)
  assert len(secs) == 4 and secs == sorted(secs)
  assert (got.num_compiled, got.num_cached, got.lower_secs, got.read_secs) == (2, 1, 1.5, 3.0)
  assert (got.plan_secs, got.compile_secs, got.warm_up_secs) == (1.0, 5.0, 0.5)
  assert got.total_secs == pytest.approx(got.startup_secs + got.elapsed_secs)
  assert got.steps == {"mixed": bench.StepTotals(1, 1, 0.5, None),
                       "decode": bench.StepTotals(3, 10, 10.0, None)}
  assert got.prompt_tokens_asked == got.prompt_tokens_optimal == 30
  assert got.prompt_tokens_computed == 60
  assert got.padding_waste == pytest.approx(1 - (60 + 12 + 2 + 6) / (64 + 80))
  assert got.kv_peak_use == 0.5
  assert got.num_preempted == 1 + 2, "counted per window"
  assert got.decode_rows == 3
  assert got.decode_ms_per_step == pytest.approx(150), "median of the loops with 3 rows"
  assert got.host_share == pytest.approx(0.25 * 10.5 / got.elapsed_secs)
  assert got.launch_share == pytest.approx(0.5 * 10.5 / got.elapsed_secs)
  assert got.output_tokens == 21
  assert got.output_tokens_per_sec * got.elapsed_secs == pytest.approx(21)
  assert got.total_tokens_per_sec * got.elapsed_secs == pytest.approx(51)
  assert got.requests_per_sec * got.elapsed_secs == pytest.approx(3)
  assert got.floor_secs is got.share_of_floor is got.decode_floor_ms is got.gemm_flops is None


def test_missing_tokens_are_an_error(monkeypatch):
  workload = random(Draw(VOCAB), num_requests=3, prompt_len=10, output_len=7)
  monkeypatch.setattr(bench, "generate", made_up_run(workload, 6))
  with pytest.raises(bench.BenchError, match="3 requests with 18 tokens .* 3 with 21"):
    bench.run(Model(CONFIG, {}), workload, ENGINE)


def test_json_is_short_and_whole():
  values = {"a": 1 / 3, "b": 123456789, "c": 1.23456789e14, "d": None, "e": {"f": 2.0, "g": True}}
  assert json.loads(bench.to_json(values)) == {
      "a": 0.33333, "b": 123456789, "c": 1.2346e14, "d": None, "e": {"f": 2.0, "g": True}}
  assert "\n" not in bench.to_json(values)


# -- configurations and the script -------------------------------------------------


@pytest.mark.parametrize("name", ["llama3_8b", "llama3_2_1b", "qwen3_0_6b"])
def test_configs_fit_a_card_of_80_gb(name):
  namespace = {}
  exec((ROOT / f"configs/{name}.py").read_text(), namespace)
  config = from_config_dict(JobConfig, namespace["get_config"]().to_dict())
  model = load_config(config.model)
  assert model.dtype == "bfloat16" and model.num_params > 5e8
  card = 80 * 10**9
  engine = planner.memory.settle(model, config.engine, CHIPS["a100"],
                                 int(planner.memory.DEVICE_SHARE * card))
  assert 0.9 * card < planner.memory.estimate_memory(model, engine).total_bytes < 0.95 * card


@pytest.fixture(scope="module")
def bench_script(tmp_path_factory):
  folder = tmp_path_factory.mktemp("bench")
  (folder / "tiny.py").write_text('''
from batchjax.config import EngineConfig, JobConfig, ModelSource, to_config_dict


def get_config():
  return to_config_dict(JobConfig(
      model=ModelSource(format="random", shape="tiny_llama"),
      engine=EngineConfig(max_rows=8, max_step_tokens=64, page_size=8, num_pages=200,
                          max_decode_steps=4, max_buckets=1, compilation_cache_dir="")))
''')

  def run(*args):
    return subprocess.run(
        [sys.executable, "scripts/bench.py", f"--config={folder / 'tiny.py'}", *args], cwd=ROOT,
        capture_output=True, text=True,
        env=os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)})
  return run


def test_script_prints_one_line_with_everything(bench_script, tmp_path):
  run = bench_script("--workload=prefix_groups", "--num_requests=12", "--prefix_len=40",
                     "--share_degree=4", "--distinct_len=6", "--output_len=12", "--noshuffled",
                     "--measure_ceilings", f"--profile={tmp_path}", "--profile_after_secs=0")
  assert run.returncode == 0, run.stderr
  line, = run.stdout.splitlines()
  got = json.loads(line)
  assert got["model"] == "tiny_llama" and got["workload"] == "prefix_groups"
  assert got["shuffled"] is False and got["share_degree"] == 4
  assert got["output_tokens"] == 144 and got["num_requests"] == 12
  # Random tokens may share a few more by chance; plans leave the shortest runs unshared.
  assert got["prompt_tokens_asked"] == 12 * 46
  assert got["prompt_tokens_optimal"] <= got["prompt_tokens_computed"] <= 3 * 40 + 12 * 6
  assert got["num_compiled"] == 2 and got["num_preempted"] == 0
  assert sum(kind["dispatches"] > 0 for kind in got["steps"].values()) == 2
  assert 0 < got["share_of_floor"] < 1 and 0 < got["host_share"] < 1
  assert got["floor_secs"] == pytest.approx(
      sum(kind["floor_secs"] for kind in got["steps"].values()), rel=1e-3)
  assert got["decode_floor_ms"] < got["decode_ms_per_step"] and got["decode_rows"] == 8
  assert got["gemm_flops"] > 1e8 and got["stream_bytes_per_sec"] > 1e8
  assert got["profile"]["kernels"] and 0 <= got["profile"]["idle_share"] < 1


def test_script_times_the_host_alone(bench_script):
  run = bench_script("--workload=random", "--num_requests=12", "--prompt_len=20", "--output_len=9",
                     "--host_only")
  assert run.returncode == 0, run.stderr
  got = json.loads(run.stdout)
  assert got["plan_secs"] > 0 and got["num_requests"] == 12 and got["dispatches"]["decode"]["count"]


SAMPLING = dict(temperature=0.7, top_p=0.9, top_k=40, presence_penalty=0.5, frequency_penalty=0.25,
                repetition_penalty=1.1, logprobs=True, top_logprobs=3, prompt_logprobs=True,
                stop_strings=2)


@pytest.mark.parametrize("host_only", [False, True])
def test_script_times_sampling_features(bench_script, host_only):
  run = bench_script("--workload=random", "--num_requests=4", "--prompt_len=20", "--output_len=9",
                     *(f"--{name}={str(value).lower()}" for name, value in SAMPLING.items()),
                     *["--host_only"] * host_only)
  assert run.returncode == 0, run.stderr
  got = json.loads(run.stdout)
  assert SAMPLING.items() <= got.items() and got["num_requests"] == 4


def test_script_explains_sampling_that_does_not_go_together(bench_script):
  run = bench_script("--workload=random", "--top_logprobs=5")
  assert run.returncode == 2
  assert "--top_logprobs must be 0 unless logprobs or prompt_logprobs is true" in run.stderr


def test_script_refuses_flags_of_other_workloads(bench_script):
  run = bench_script("--workload=random", "--share_degree=4")
  assert run.returncode == 2
  assert "--workload=random has no share_degree; it has num_requests" in run.stderr


def test_script_explains_a_bad_configuration(bench_script):
  run = bench_script("--workload=random", "--config.engine.page_size=7")
  assert run.returncode == 2
  assert "page_size=7 must be a power of two" in run.stderr
