"""A job goes on after any kill, and finishes every row exactly once."""

import gzip
import hashlib
import itertools
import json
import os
from pathlib import Path
import random
import signal
import subprocess
import sys

import numpy as np
import pytest

from batchjax.io import output, records
from batchjax.io.journal import JournalError
from batchjax.io.store import StoredRow
from batchjax.jobs import job as job_lib
from batchjax.types import Choice, Completion, Request

IDENTITY = {"input": {"sha256": "ab"}, "sampling": {"temperature": 0.5, "stop": ("a",)}, "seed": 0}
NUM_ROWS = 12


class Tokenizer:

  def text_pieces(self, token_ids, echoed=()):
    return [b"%d " % token for token in token_ids]

  def token_name(self, token):
    return b"%d" % token


def append(job, index):
  if index % 5 == 3:
    job.append_error(index, output.format_error(
        records.RowError(index, index + 1, f"r{index}", "n", "bad", "invalid_value"),
        job_id=job.id))
  else:
    form = ("plain", "chat", "completions")[index % 3]
    request = Request(f"r{index}", np.array([1], np.int32))
    completion = Completion(f"r{index}", (Choice(0, np.array([index], np.int32), "stop"),), 1, 0)
    job.append(index, output.format_completion(
        StoredRow(index, index + 1, form, "m", False, False, request), completion,
        tokenizer=Tokenizer(), job_id=job.id))


def run(directory, out, order, stop_after=None):
  """Runs the job's unfinished rows in an order of its own; finishes unless stopped."""
  with job_lib.open_job(directory, IDENTITY) as job:
    todo = [index for index in order if not job.finished_rows(NUM_ROWS)[index]]
    for index in todo[:stop_after]:
      append(job, index)
    return None if stop_after else job.finish(out, out.with_name("err-" + out.name), NUM_ROWS)


@pytest.mark.parametrize("name", ["o.jsonl", "o.jsonl.gz", "o.parquet"])
def test_resumed_and_uninterrupted_jobs_write_the_same_bytes(tmp_path, name):
  files = {}
  for i, stops in enumerate([(), (1, 4, 2)]):
    out = tmp_path / str(i) / name
    out.parent.mkdir()
    order = random.Random(i).sample(range(NUM_ROWS), NUM_ROWS)
    for stop_after in stops:
      assert run(tmp_path / f"{i}.job", out, order, stop_after) is None
      assert not out.exists()
    assert str(run(tmp_path / f"{i}.job", out, order)) == "10 completions, 2 errors"
    files[i] = {path.name: path.read_bytes() for path in out.parent.iterdir()}
  assert files[0] == files[1]
  assert set(files[0]) == {name, "err-" + name}


def test_output_is_in_input_order_each_row_once(tmp_path):
  run(tmp_path / "j", tmp_path / "o.jsonl", reversed(range(NUM_ROWS)))
  rows = [json.loads(line) for line in (tmp_path / "o.jsonl").read_text().splitlines()]
  errors = [json.loads(line) for line in (tmp_path / "err-o.jsonl").read_text().splitlines()]
  assert [row.get("custom_id", row["id"]) for row in rows] == [
      f"r{i}" for i in range(NUM_ROWS) if i % 5 != 3]
  assert [row["custom_id"] for row in errors] == ["r3", "r8"]


def test_a_finished_job_has_nothing_to_do(tmp_path):
  out = tmp_path / "o.jsonl"
  assert not run(tmp_path / "j", out, range(NUM_ROWS)).was_finished
  before = out.read_bytes(), out.stat().st_mtime_ns
  again = run(tmp_path / "j", out, range(NUM_ROWS))
  assert str(again) == "already finished: 10 completions, 2 errors; nothing to do"
  assert (out.read_bytes(), out.stat().st_mtime_ns) == before
  out.unlink()
  assert not run(tmp_path / "j", out, range(NUM_ROWS)).was_finished
  assert out.read_bytes() == before[0]


def test_killed_between_the_two_files(tmp_path, monkeypatch):
  out = tmp_path / "o.jsonl"
  real = job_lib.files.write_rows

  def write_rows(path, rows):
    if path.name.startswith("err-"):
      raise KeyboardInterrupt
    real(path, rows)

  with monkeypatch.context() as patch:
    patch.setattr(job_lib.files, "write_rows", write_rows)
    with pytest.raises(KeyboardInterrupt):
      run(tmp_path / "j", out, range(NUM_ROWS))
  assert not run(tmp_path / "j", out, range(NUM_ROWS)).was_finished
  assert (tmp_path / "err-o.jsonl").read_text().count("\n") == 2


def test_finish_needs_every_row(tmp_path):
  with job_lib.open_job(tmp_path / "j", IDENTITY) as job:
    append(job, 0)
    append(job, 2)
    with pytest.raises(job_lib.JobError, match="2 of 4 rows are unfinished, the first at index 1"):
      job.finish(tmp_path / "o.jsonl", tmp_path / "e.jsonl", 4)
    with pytest.raises(JournalError, match="row index 2 is in .* already"):
      append(job, 2)
  assert not (tmp_path / "o.jsonl").exists()


def test_bad_paths_are_told_before_anything_is_written(tmp_path):
  with job_lib.open_job(tmp_path / "j", IDENTITY) as job:
    append(job, 0)
    with pytest.raises(records.InputError, match="must be one of"):
      job.finish(tmp_path / "o.jsonl", tmp_path / "e.txt", 1)
  assert not (tmp_path / "o.jsonl").exists()


def test_mismatch_shows_what_differs(tmp_path):
  job_lib.open_job(tmp_path / "j", IDENTITY).close()
  other = {"input": {"sha256": "cd"}, "sampling": {"temperature": 0.5, "stop": ["a", "b"]},
           "model": {}}
  with pytest.raises(job_lib.JobMismatch) as e:
    job_lib.open_job(tmp_path / "j", other)
  assert str(e.value) == f"""{tmp_path / "j"} belongs to a job with other settings (then -> now):
  input.sha256: "ab" -> "cd"
  model: (absent) -> {{}}
  sampling.stop: ["a"] -> ["a", "b"]
  seed: 0 -> (absent)
Restore them to go on with that job, name another output, or delete the directory to start anew."""
  with job_lib.open_job(tmp_path / "j", IDENTITY) as job:  # the lock was let go
    append(job, 0)


def test_identity_is_json_so_tuples_and_lists_agree(tmp_path):
  first = job_lib.open_job(tmp_path / "j", IDENTITY)
  first.close()
  again = job_lib.open_job(tmp_path / "j", json.loads(json.dumps(IDENTITY)))
  again.close()
  assert first.id == again.id and len(first.id) == 16
  other = job_lib.open_job(tmp_path / "k", IDENTITY | {"seed": 1})
  other.close()
  assert other.id != first.id


def test_versions_are_kept_but_do_not_matter(tmp_path):
  job_lib.open_job(tmp_path / "j", IDENTITY).close()
  path = tmp_path / "j" / "manifest.json"
  manifest = json.loads(path.read_text())
  assert manifest["versions"]["numpy"] == np.__version__
  path.write_text(json.dumps(manifest | {"versions": {"numpy": "0"}}))
  job_lib.open_job(tmp_path / "j", IDENTITY).close()


@pytest.mark.parametrize("text", ["", "{", "[]", '{"identity": {}}'])
def test_damaged_manifest(tmp_path, text):
  job_lib.open_job(tmp_path / "j", IDENTITY).close()
  (tmp_path / "j" / "manifest.json").write_text(text)
  with pytest.raises(job_lib.JobError, match="manifest.json is damaged .*delete .* to start anew"):
    job_lib.open_job(tmp_path / "j", IDENTITY)


def test_journal_without_manifest(tmp_path):
  job_lib.open_job(tmp_path / "j", IDENTITY).close()
  (tmp_path / "j" / "manifest.json").unlink()
  with pytest.raises(job_lib.JobError, match="has a journal but no manifest.json"):
    job_lib.open_job(tmp_path / "j", IDENTITY)


def test_one_process_at_a_time(tmp_path):
  with job_lib.open_job(tmp_path / "j", IDENTITY):
    with pytest.raises(job_lib.JobError, match=f"in use by process {os.getpid()}: wait for it"):
      job_lib.open_job(tmp_path / "j", IDENTITY)
  job_lib.open_job(tmp_path / "j", IDENTITY).close()


WORKER = """
import sys
from batchjax.jobs import job
with job.open_job(sys.argv[1], {"seed": 0}) as j:
  finished = j.finished_rows(10**6)
  for i in range(10**6):
    if not finished[i]:
      j.append(i, {"id": f"r{i}", "text": "x" * (i % 50)})
      print(i, flush=True)
"""


def test_sigkill_loses_no_row_that_was_appended(tmp_path):
  env = os.environ | {"PYTHONPATH": str(Path(job_lib.__file__).parents[2])}
  said = -1
  for num_lines in (3, 40):
    worker = subprocess.Popen([sys.executable, "-c", WORKER, str(tmp_path / "j")], env=env,
                              stdout=subprocess.PIPE, text=True)
    lines = list(itertools.islice(worker.stdout, num_lines))
    worker.send_signal(signal.SIGKILL)
    lines += worker.stdout.readlines()
    worker.wait()
    worker.stdout.close()
    assert int(lines[0]) in (said + 1, said + 2)  # a kill between append and print says one less
    said = int(lines[-1])
  with job_lib.open_job(tmp_path / "j", {"seed": 0}) as job:
    num_rows = int(job.finished_rows(10**6).sum())
    assert num_rows in (said + 1, said + 2)
    job.finish(tmp_path / "o.jsonl", tmp_path / "e.jsonl", num_rows)
  rows = [json.loads(line) for line in (tmp_path / "o.jsonl").read_text().splitlines()]
  assert rows == [{"id": f"r{i}", "text": "x" * (i % 50)} for i in range(num_rows)]


def test_hash_file(tmp_path):
  data = gzip.compress(b"x" * 10) + bytes(3 << 20)
  (tmp_path / "in.bin").write_bytes(data)
  assert job_lib.hash_file(tmp_path / "in.bin") == hashlib.sha256(data).hexdigest()
  with pytest.raises(records.InputError, match="does not exist"):
    job_lib.hash_file(tmp_path / "no.bin")
