"""The metrics file: what is written is read, whatever a kill leaves behind."""

import dataclasses
import json
import pathlib
import tempfile

from hypothesis import given
from hypothesis import strategies as st
import numpy as np
import pytest

from batchjax.report import MetricsError, MetricsWriter, read_records, read_runs, RequestRecord


def test_records_come_back_equal_and_grouped_by_run(job_dir, first_run, second_run):
  path = job_dir / "metrics.jsonl"
  assert list(read_records(path)) == first_run + second_run
  first, second = read_runs(path)
  assert (first.record, second.record) == (first_run[0], second_run[0])
  assert first.compiles == first_run[1:3] and not second.compiles
  assert first.steps == [first_run[4], first_run[6]]
  assert (first.start, second.start) == (first_run[3], second_run[1])
  assert second.requests == second_run[3:]
  assert (first.wall_secs, second.wall_secs) == (4.0, 6.0)


def test_each_line_is_json_with_its_type(job_dir):
  lines = (job_dir / "metrics.jsonl").read_text().splitlines()
  assert [json.loads(line)["record"] for line in lines[:5]] == [
      "run", "compile", "compile", "start", "step"]


def test_lines_are_on_disk_before_close(tmp_path, run_record):
  writer = MetricsWriter(tmp_path / "metrics.jsonl")
  writer.write(run_record)
  assert list(read_records(tmp_path / "metrics.jsonl")) == [run_record]
  writer.close()


def test_a_file_cut_anywhere_reads_as_its_whole_lines(job_dir, tmp_path, first_run, second_run):
  data = (job_dir / "metrics.jsonl").read_bytes()
  cut_path = tmp_path / "cut.jsonl"
  for cut in range(0, len(data), 37):
    cut_path.write_bytes(data[:cut])
    whole = data[:cut].count(b"\n")
    assert list(read_records(cut_path)) == (first_run + second_run)[:whole]


@pytest.mark.parametrize("torn", ['{"record": "step", "se', "x" * 200_000, "é"])
def test_a_resume_cuts_off_the_torn_line(tmp_path, run_record, step_record, torn):
  path = tmp_path / "metrics.jsonl"
  with MetricsWriter(path) as writer:
    writer.write(run_record)
  with path.open("a") as file:
    file.write(torn)
  with MetricsWriter(path) as writer:
    writer.write(step_record)
  assert list(read_records(path)) == [run_record, step_record]


def test_a_file_that_is_one_torn_line_starts_anew(tmp_path, run_record):
  path = tmp_path / "metrics.jsonl"
  path.write_text('{"record": "ru')
  with MetricsWriter(path) as writer:
    writer.write(run_record)
  assert list(read_records(path)) == [run_record]


@pytest.mark.parametrize("line", ["{]", "[1]", '{"record": "nonsense"}', '{"secs": 1}',
                                  '{"record": "compile", "bucket": "x"}',
                                  '{"record": "compile", "bucket": "x", "secs": 1, "cached": 1, '
                                  '"more": 2}'])
def test_a_damaged_whole_line_is_named(job_dir, line):
  path = job_dir / "metrics.jsonl"
  with path.open("a") as file:
    file.write(line + "\n")
  with pytest.raises(MetricsError, match=r"metrics\.jsonl, line 15 "):
    read_runs(path)


def test_a_record_before_the_first_run_is_an_error(tmp_path, step_record):
  path = tmp_path / "metrics.jsonl"
  with MetricsWriter(path) as writer:
    writer.write(step_record)
  with pytest.raises(MetricsError, match="a run must come first"):
    read_runs(path)


def test_numpy_scalars_are_numbers_and_nan_is_refused(tmp_path, step_record):
  path = tmp_path / "metrics.jsonl"
  with MetricsWriter(path) as writer:
    writer.write(dataclasses.replace(step_record, num_rows=np.int32(3), secs=np.float32(2.0)))
    with pytest.raises(ValueError):
      writer.write(dataclasses.replace(step_record, secs=float("nan")))
  assert list(read_records(path)) == [step_record]


def test_bucket_names_tell_kind_and_shape(step_record):
  assert step_record.bucket == "mixed 128x8"
  decode = dataclasses.replace(step_record, kind="decode", num_steps=16, bucket_rows=64)
  assert decode.bucket == "decode 64"


_COUNTS = st.integers(0, 2**40)
_SECS = st.floats(0, 1e9)
_IDS = st.text(st.characters(codec=None, exclude_categories=()))
_REQUESTS = st.builds(
    RequestRecord, request_id=_IDS, row=_COUNTS, prompt_tokens=_COUNTS, cached_tokens=_COUNTS,
    generated_tokens=_COUNTS, start_secs=_SECS, end_secs=_SECS,
    finish_reason=st.sampled_from(["stop", "length", "error"]))


@given(st.lists(st.lists(_REQUESTS, max_size=4), min_size=1, max_size=4), st.data())
def test_any_kills_and_resumes_lose_at_most_the_last_line_of_each_run(runs, data):
  """Ids are any text: line breaks, NULs and lone surrogates of users included."""
  with tempfile.TemporaryDirectory() as folder:
    path = pathlib.Path(folder) / "metrics.jsonl"
    expected = []
    for run in runs:
      with MetricsWriter(path) as writer:
        for record in run:
          writer.write(record)
      expected += run
      whole = path.read_bytes()
      if run and data.draw(st.booleans(), label="killed"):
        last_line = whole[:-1].rfind(b"\n") + 1
        path.write_bytes(whole[:data.draw(st.integers(last_line, len(whole) - 1), label="at")])
        expected.pop()
      assert list(read_records(path)) == expected
