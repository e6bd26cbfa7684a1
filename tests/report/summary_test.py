"""The figures of a job, against sums by hand over the records of `conftest`."""

import json

import pytest

from batchjax.report import RunFigures, StartRecord, StepTotals, summarize, to_text


def test_runs_add_up(job_dir):
  s = summarize(job_dir)
  assert s.name == "out.jsonl.job"
  assert len(s.runs) == 2
  assert (s.num_requests, s.num_finished, s.num_errors, s.is_complete) == (4, 3, 1, True)
  assert (s.prompt_tokens, s.finished_prompt_tokens) == (400, 300)
  assert s.computed_tokens == 118 + 50
  assert (s.generated_tokens, s.output_tokens) == (2 + 48 + 2, 20 + 30 + 10)
  assert (s.host_secs, s.host_share) == (0.75, 0.1875)
  assert s.num_preempted == 2 + 1


def test_the_last_run_and_all_runs_have_their_own_figures(job_dir):
  s = summarize(job_dir)
  assert s.last_run == RunFigures(2, 2, 200, 50, 6.0, 1.0, StartRecord(0.125, 0.25, 0.0, 0.0, 0.025))
  assert s.all_runs == RunFigures(3, 52, 300, 168, 10.0, 4.0, StartRecord(0.375, 0.75, 0.05, 0.1, 0.025))
  assert (s.all_runs.output_tokens_per_sec, s.all_runs.wall_tokens_per_sec) == (13.0, 5.2)


def test_a_record_that_a_kill_took_leaves_the_job_complete(job_dir):
  path = job_dir / "metrics.jsonl"
  path.write_text("".join(line for line in path.read_text().splitlines(keepends=True)
                          if "script" not in line))
  s = summarize(job_dir)
  assert (s.num_finished, s.num_errors, s.is_complete) == (3, 1, True)


def test_files_of_before_starts_were_recorded_are_read(job_dir):
  path = job_dir / "metrics.jsonl"
  lines = [json.loads(line) for line in path.read_text().splitlines()]
  lines = [{k: v for k, v in line.items() if k != "num_done"} for line in lines
           if line["record"] != "start"]
  path.write_text("".join(json.dumps(line) + "\n" for line in lines))
  s = summarize(job_dir)
  assert s.is_complete and s.all_runs.start is None and s.all_runs.wall_secs == 10.0
  assert "what came before them is not recorded" in " ".join(to_text(s).split())


def test_a_request_answered_twice_counts_once_as_last_recorded(job_dir):
  s = summarize(job_dir)
  assert s.cached_tokens == 0 + 50 + 70
  assert s.cached_share == 0.4
  assert s.finish_reasons == (("stop", 2), ("error", 1), ("length", 1))


def test_padding_by_kind_and_bucket(job_dir):
  s = summarize(job_dir)
  assert s.kinds == (StepTotals("mixed", 2, 2, 2.0, 240, 256),
                     StepTotals("decode", 1, 16, 2.0, 48, 128))
  assert [bucket.name for bucket in s.buckets] == ["mixed 128x8", "decode 8"]
  assert [bucket.padding for bucket in s.buckets] == [0.0625, 0.625]
  assert s.padding == 1 - 288 / 384


def test_peak_use_is_of_each_runs_own_pool(job_dir):
  s = summarize(job_dir)
  assert (s.peak_pages, s.peak_pool_pages, s.peak_kv_use) == (30, 40, 0.75)


def test_compiles(job_dir):
  s = summarize(job_dir)
  assert (s.num_compiles, s.num_cached_compiles) == (2, 1)


def test_slowest_first_without_errors(job_dir):
  slowest = summarize(job_dir, num_slowest=2).slowest
  assert [r.request_id for r in slowest] == ["last", "lost"]


def test_a_killed_run_is_not_complete(job_dir):
  path = job_dir / "metrics.jsonl"
  lines = path.read_text().splitlines(keepends=True)
  path.write_text("".join(lines[:9]) + lines[9][:20])
  s = summarize(job_dir)
  assert (s.num_finished, s.num_errors, s.is_complete, s.all_runs.wall_secs) == (2, 1, False, 4.0)


def test_an_empty_job_is_all_zero(tmp_path):
  s = summarize(tmp_path)
  assert (s.runs, s.num_requests, s.kinds, s.slowest) == ((), 0, (), ())
  assert (s.all_runs.output_tokens_per_sec, s.cached_share, s.padding, s.host_share) == (0, 0, 0, 0)
  assert not s.is_complete


def test_a_missing_directory_is_named(tmp_path):
  with pytest.raises(FileNotFoundError, match="none.job is no job directory"):
    summarize(tmp_path / "none.job")
