"""A small job, killed once and resumed, whose sums are known."""

import dataclasses
import json
import pathlib

import pytest

from batchjax.report import (CompileRecord, MetricsWriter, RequestRecord, RunRecord, StartRecord,
                             StepRecord)

RUN = RunRecord(
    time=1.7e9, device_kind="TPU v5e", num_devices=4, model="tiny <llama>", jax_version="0.10.2",
    num_requests=4, num_prompt_tokens=400, num_pages=100, page_size=16, max_rows=8,
    buckets=("mixed 128x8", "decode 8"))
MIXED = StepRecord(
    secs=2.0, kind="mixed", step_secs=1.0, host_secs=0.25, num_steps=1, num_tokens=120,
    bucket_tokens=128, num_rows=3, bucket_rows=8, prompt_tokens=118, generated_tokens=2,
    used_pages=20, waiting=1, finished=1, preempted=0)
DECODE = StepRecord(
    secs=4.0, kind="decode", step_secs=2.0, host_secs=0.25, num_steps=16, num_tokens=48,
    bucket_tokens=128, num_rows=3, bucket_rows=8, prompt_tokens=0, generated_tokens=48,
    used_pages=60, waiting=1, finished=2, preempted=2)
FIRST_RUN = [
    RUN,
    CompileRecord("mixed 128x8", 1.5, False),
    CompileRecord("decode 8", 0.5, True),
    StartRecord(0.25, 0.5, 0.05, 0.1, 0.0),
    MIXED,
    RequestRecord("bad row", 3, 0, 0, 0, 0.0, 0.0, "error"),
    DECODE,
    RequestRecord("<script>alert(1)</script>", 0, 100, 0, 20, 1.0, 4.0, "stop"),
    RequestRecord("lost", 1, 100, 80, 30, 1.0, 2.0, "length"),
]
# "lost" was done but not in the journal at the kill, so the second run answers it again.
SECOND_RUN = [
    dataclasses.replace(RUN, time=1.7e9 + 60, num_requests=2, num_prompt_tokens=200, num_pages=40,
                        num_done=2),
    StartRecord(0.125, 0.25, 0.0, 0.0, 0.025),
    dataclasses.replace(MIXED, secs=1.0, prompt_tokens=50, used_pages=30, waiting=0, preempted=1),
    RequestRecord("lost", 1, 100, 50, 30, 0.0, 5.0, "length"),
    RequestRecord("last", 2, 100, 70, 10, 0.0, 6.0, "stop"),
]
PLAN = {
    "nodes": [{"parent": -1, "start": 0, "length": 50, "num_rows": 4},
              {"parent": 0, "start": 50, "length": 20, "num_rows": 2, "text": "<b>Q</b>: Why?"},
              {"parent": 0, "start": 50, "length": 10, "num_rows": 2}],
    "totals": {"prompt_tokens_asked": 400, "prompt_tokens_computed": 230, "optimum": 220},
    "buckets": [{"kind": "mixed", "tokens": 128, "rows": 8}],
    "predicted_secs": 9.5,
}


@pytest.fixture
def job_dir(tmp_path: pathlib.Path) -> pathlib.Path:
  path = tmp_path / "out.jsonl.job"
  path.mkdir()
  for records in (FIRST_RUN, SECOND_RUN):
    with MetricsWriter(path / "metrics.jsonl") as writer:
      for record in records:
        writer.write(record)
  (path / "plan.json").write_text(json.dumps(PLAN))
  (path / "manifest.json").write_text(json.dumps(
      {"input": "a & b.jsonl", "engine": {"max_rows": 8, "share_prefixes": True, "stop": []}}))
  return path


@pytest.fixture
def run_record() -> RunRecord:
  return RUN


@pytest.fixture
def step_record() -> StepRecord:
  return MIXED


@pytest.fixture
def first_run() -> list:
  return list(FIRST_RUN)


@pytest.fixture
def second_run() -> list:
  return list(SECOND_RUN)


@pytest.fixture
def plan_values() -> dict:
  return json.loads(json.dumps(PLAN))
