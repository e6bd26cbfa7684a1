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

from batchjax.io import files, output, records
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
    done = job.begin(NUM_ROWS)
    todo = [index for index in order if not done[index]]
    for index in todo[:stop_after]:
      append(job, index)
    return None if stop_after else job.finish(out, out.with_name("err-" + out.name))


@pytest.mark.parametrize("name", ["o.jsonl", "o.jsonl.gz", "o.parquet"])
def test_resumed_and_uninterrupted_jobs_write_the_same_bytes(tmp_path, name):
  written = {}
  for i, stops in enumerate([(), (1, 4, 2)]):
    out = tmp_path / str(i) / name
    out.parent.mkdir()
    order = random.Random(i).sample(range(NUM_ROWS), NUM_ROWS)
    for stop_after in stops:
      assert run(tmp_path / f"{i}.job", out, order, stop_after) is None
      assert not out.exists()
    assert str(run(tmp_path / f"{i}.job", out, order)) == "10 completions, 2 errors"
    written[i] = {path.name: path.read_bytes() for path in out.parent.iterdir()}
  assert written[0] == written[1]
  assert set(written[0]) == {name, "err-" + name}


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
    job.begin(4)
    append(job, 0)
    append(job, 2)
    with pytest.raises(job_lib.JobError, match="2 of 4 rows are unfinished, the first at index 1"):
      job.finish(tmp_path / "o.jsonl", tmp_path / "e.jsonl")
    with pytest.raises(JournalError, match="row index 2 is in .* already"):
      append(job, 2)
  assert not (tmp_path / "o.jsonl").exists()


def test_bad_paths_are_told_before_anything_is_written(tmp_path):
  with job_lib.open_job(tmp_path / "j", IDENTITY) as job:
    job.begin(1)
    append(job, 0)
    with pytest.raises(records.InputError, match="must be one of"):
      job.finish(tmp_path / "o.jsonl", tmp_path / "e.txt")
  assert not (tmp_path / "o.jsonl").exists()


def begun(directory, *rows, identity=IDENTITY):
  """A job stopped after these rows."""
  with job_lib.open_job(directory, identity) as job:
    job.begin(NUM_ROWS)
    for index in rows:
      append(job, index)


OTHER = {"input": {"sha256": "cd"}, "sampling": {"temperature": 0.5, "stop": ["a", "b"]}, "model": {}}


def test_mismatch_shows_what_differs_on_one_line(tmp_path):
  begun(tmp_path / "j", 0)
  with pytest.raises(job_lib.JobMismatch) as e:
    job_lib.open_job(tmp_path / "j", OTHER)
  assert str(e.value) == (
      f"{tmp_path / 'j'} belongs to a job with other settings (then -> now): "
      'input.sha256: "ab" -> "cd"; model: (absent) -> {}; sampling.stop: ["a"] -> ["a", "b"]; '
      "seed: 0 -> (absent). Restore them to go on with that job, name another output, or start anew "
      "with --overwrite")
  begun(tmp_path / "j", 1)  # the lock was let go, and the row is kept
  with job_lib.open_job(tmp_path / "j", IDENTITY) as job:
    assert job.begin(NUM_ROWS).sum() == 2


@pytest.mark.parametrize("rows", [(), (3,), (3, 8)])
def test_a_job_without_an_output_is_taken_over(tmp_path, rows):
  begun(tmp_path / "j", *rows)  # these are error rows
  (tmp_path / "j/prepared.json").write_text("of the other job")
  with job_lib.open_job(tmp_path / "j", OTHER) as job:
    assert not (tmp_path / "j/prepared.json").exists()
    assert not job.begin(NUM_ROWS).any()


def test_a_finished_job_is_not_taken_over_though_its_journal_is_gone(tmp_path):
  run(tmp_path / "j", tmp_path / "o.jsonl", range(NUM_ROWS))
  (tmp_path / "j/journal.jsonl").unlink()
  with pytest.raises(job_lib.JobMismatch):
    job_lib.open_job(tmp_path / "j", OTHER)
  with job_lib.open_job(tmp_path / "j", IDENTITY) as job:
    assert not job.begin(NUM_ROWS).any()


def test_a_job_with_an_output_is_never_discarded(tmp_path):
  for rows, is_left in (((3,), False), ((3, 4), True), ((), True)):
    with job_lib.open_job(tmp_path / "j", IDENTITY) as job:
      job.begin(NUM_ROWS)
      for index in rows:
        append(job, index)
      before = (tmp_path / "j/journal.jsonl").read_bytes()
      job.discard_if_empty()
    assert (tmp_path / "j").exists() == is_left
    assert not is_left or (tmp_path / "j/journal.jsonl").read_bytes() == before


def test_overwrite_moves_the_folder_aside(tmp_path):
  for number in (1, 2):
    begun(tmp_path / "j", 0)
    before = {path.name: path.read_bytes() for path in (tmp_path / "j").iterdir()}
    with job_lib.open_job(tmp_path / "j", OTHER, overwrite=True) as job:
      assert not job.begin(NUM_ROWS).any()
    assert {path.name: path.read_bytes() for path in (tmp_path / f"j.{number}").iterdir()} == before
    (tmp_path / "j").rename(tmp_path / f"taken{number}")
  job_lib.open_job(tmp_path / "new", OTHER, overwrite=True).close()
  with job_lib.open_job(tmp_path / "new", OTHER):
    with pytest.raises(job_lib.JobError, match="in use by process"):
      job_lib.open_job(tmp_path / "new", OTHER, overwrite=True)
  (tmp_path / "file").write_text("x")
  with pytest.raises(job_lib.JobError, match="file is not a folder: move it away"):
    job_lib.open_job(tmp_path / "file", OTHER)
  job_lib.open_job(tmp_path / "file", OTHER, overwrite=True).close()
  assert (tmp_path / "file.1").read_text() == "x"


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
  begun(tmp_path / "j", 0)
  path = tmp_path / "j" / "manifest.json"
  manifest = files.read_sealed(path, "identity", "versions", "finished")
  assert manifest["versions"]["numpy"] == np.__version__
  files.write_sealed(path, manifest | {"versions": {"numpy": "0"}})
  with job_lib.open_job(tmp_path / "j", IDENTITY) as job:
    assert job.begin(NUM_ROWS).sum() == 1


def damaged_manifests(whole):
  yield from ("", "{", "[]", "[" * 10**5, '{"identity": {}}', None)
  yield whole.replace('"seed": 0', '"seed": 1')


def test_a_damaged_manifest_is_made_again_from_the_journal(tmp_path, caplog):
  out = tmp_path / "o.jsonl"
  run(tmp_path / "j", out, range(NUM_ROWS))
  path = tmp_path / "j" / "manifest.json"
  whole = path.read_text()
  for text in damaged_manifests(whole):
    caplog.clear()
    path.unlink() if text is None else path.write_text(text)
    with job_lib.open_job(tmp_path / "j", IDENTITY) as job:
      assert job.begin(NUM_ROWS).all()
    assert "made again, the journal's rows are this job's" in caplog.text
    path.unlink() if text is None else path.write_text(text)
    with pytest.raises(job_lib.JobError, match="manifest.json is .* or start anew with --overwrite"):
      job_lib.open_job(tmp_path / "j", OTHER)
  assert run(tmp_path / "j", out, ()) == job_lib.Finished(10, 2, was_finished=False)


def test_a_manifest_of_another_job_yields_to_the_journal(tmp_path):
  begun(tmp_path / "j", 0)
  begun(tmp_path / "k", 1, identity=OTHER)
  (tmp_path / "j/manifest.json").write_bytes((tmp_path / "k/manifest.json").read_bytes())
  with job_lib.open_job(tmp_path / "j", IDENTITY) as job:
    assert job.begin(NUM_ROWS).sum() == 1


@pytest.mark.parametrize("damage_fn", [
    lambda data: None, lambda data: data[:-9], lambda data: b"", lambda data: b"x" * len(data)])
@pytest.mark.parametrize("name", ["o.parquet", "err-o.parquet"])
def test_a_finished_file_that_changed_is_written_again(tmp_path, caplog, name, damage_fn):
  out = tmp_path / "o.parquet"
  run(tmp_path / "j", out, range(NUM_ROWS))
  whole = {path.name: path.read_bytes() for path in tmp_path.glob("*.parquet")}
  data = damage_fn(whole[name])
  (tmp_path / name).unlink() if data is None else (tmp_path / name).write_bytes(data)
  assert not run(tmp_path / "j", out, ()).was_finished
  assert f"{tmp_path / name} is not as this job wrote it" in caplog.text
  assert {path.name: path.read_bytes() for path in tmp_path.glob("*.parquet")} == whole
  assert run(tmp_path / "j", out, ()).was_finished


def test_what_is_planted_in_the_folder_is_not_opened(tmp_path):
  begun(tmp_path / "j", 0)
  target = tmp_path / "target"
  target.write_text("not the job's")
  for name in ("manifest.json", "journal.jsonl", "prepared.json", "requests.arrow", "plan.json",
               "metrics.jsonl", "lock"):
    path = tmp_path / "j" / name
    for plant, kind in ((lambda: path.symlink_to(target), "a symbolic link"),
                        (lambda: os.mkfifo(path), "a pipe"), (lambda: path.mkdir(), "a directory")):
      path.rename(tmp_path / "kept") if path.exists() else None
      plant()
      with pytest.raises(files.NotRegular, match=f"{name} is {kind}, .*: remove it"):
        job_lib.open_job(tmp_path / "j", IDENTITY)
      path.rmdir() if kind == "a directory" else path.unlink()
      (tmp_path / "kept").rename(path) if (tmp_path / "kept").exists() else None
  assert target.read_text() == "not the job's"
  with job_lib.open_job(tmp_path / "j", IDENTITY) as job:
    assert job.begin(NUM_ROWS).sum() == 1


def test_modes_are_the_umasks_but_for_the_lock(tmp_path):
  previous = os.umask(0o027)
  try:
    run(tmp_path / "j", tmp_path / "o.jsonl", range(NUM_ROWS))
  finally:
    os.umask(previous)
  paths = [*(tmp_path / "j").iterdir(), *tmp_path.glob("*.jsonl")]
  assert {path.name: path.stat().st_mode & 0o777 for path in paths} == {
      "lock": 0o600, "manifest.json": 0o640, "journal.jsonl": 0o640, "o.jsonl": 0o640,
      "err-o.jsonl": 0o640}


def test_one_process_at_a_time(tmp_path):
  with job_lib.open_job(tmp_path / "j", IDENTITY):
    with pytest.raises(job_lib.JobError, match=f"in use by process {os.getpid()}: wait for it"):
      job_lib.open_job(tmp_path / "j", IDENTITY)
  job_lib.open_job(tmp_path / "j", IDENTITY).close()


WORKER = """
import sys
from batchjax.jobs import job
with job.open_job(sys.argv[1], {"seed": 0}) as j:
  finished = j.begin(10**6)
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
    num_rows = int(job.begin(10**6).sum())
    assert num_rows in (said + 1, said + 2)
  with job_lib.open_job(tmp_path / "j", {"seed": 0}) as job:
    job.begin(num_rows)
    job.finish(tmp_path / "o.jsonl", tmp_path / "e.jsonl")
  rows = [json.loads(line) for line in (tmp_path / "o.jsonl").read_text().splitlines()]
  assert rows == [{"id": f"r{i}", "text": "x" * (i % 50)} for i in range(num_rows)]


def test_hash_file(tmp_path):
  data = gzip.compress(b"x" * 10) + bytes(3 << 20)
  (tmp_path / "in.bin").write_bytes(data)
  assert job_lib.hash_file(tmp_path / "in.bin") == hashlib.sha256(data).hexdigest()
  with pytest.raises(records.InputError, match="does not exist"):
    job_lib.hash_file(tmp_path / "no.bin")
