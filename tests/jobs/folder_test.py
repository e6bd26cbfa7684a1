"""What a job does with its folder, its paths and a full disk: nothing done is lost, nothing planted is used."""

import os
import pathlib
import resource
from unittest import mock

import pytest

from batchjax.commands import command_line
from batchjax.config import ConfigError
from batchjax.io import files
from batchjax.io.records import InputError
from batchjax.io.store import RequestWriter
from batchjax.jobs import loaders
from batchjax.jobs.job import JobMismatch
from batchjax.jobs.prepare import BadRow
from batchjax.jobs.signals import Interrupted
from batchjax.testing.fake_tokenizer import FakeTokenizer
from tests.jobs import fake_folder

ENDINGS = (OSError(28, "No space left on device"), MemoryError(), ValueError("v"), RuntimeError("r"),
           BadRow("b"), InputError("i"), Interrupted(), KeyboardInterrupt(), SystemExit(1))


@pytest.fixture(autouse=True, params=fake_folder.TASKS)
def task(request):
  """Every test is about jobs that complete and about jobs that score."""
  with fake_folder.of_task(request.param):
    yield


def outputs(folder):
  return {name: (folder / name).read_bytes() for name in ("out.jsonl", "out.errors.jsonl")}


def job_files(folder):
  return {path.name: path.read_bytes() for path in (folder / "out.jsonl.job").iterdir()}


@pytest.fixture
def expected(tmp_path):
  (tmp_path / "undisturbed").mkdir()
  fake_folder.write_input(tmp_path / "undisturbed", 0)
  fake_folder.run(tmp_path / "undisturbed")
  return outputs(tmp_path / "undisturbed")


def run_failing(folder, error, part, **kwargs):
  """A job in which the model's loading, or the storing of requests, raises."""
  def fail(*args):
    raise error

  model_fn = fail if part == "model" else lambda source, mesh: None
  with mock.patch.object(RequestWriter, "append", fail if part == "store" else RequestWriter.append):
    fake_folder.run(folder, **kwargs, loaders=loaders.Loaders(
        lambda source: fake_folder.SHAPE, lambda source: FakeTokenizer(), model_fn))


@pytest.mark.parametrize("error", ENDINGS, ids=lambda e: type(e).__name__)
def test_a_half_done_job_that_cannot_be_prepared_again_keeps_all(tmp_path, expected, error):
  fake_folder.write_input(tmp_path, 0)
  with pytest.raises(Interrupted):
    fake_folder.run(tmp_path, stop_after=5)
  (tmp_path / "out.jsonl.job/prepared.json").write_text("damaged")
  before = job_files(tmp_path)
  with pytest.raises(type(error)):
    run_failing(tmp_path, error, "store")
  after = job_files(tmp_path)
  assert {name: after[name] for name in ("journal.jsonl", "manifest.json")} == {
      name: before[name] for name in ("journal.jsonl", "manifest.json")}
  fake_folder.run(tmp_path)
  assert outputs(tmp_path) == expected
  assert after["journal.jsonl"] in job_files(tmp_path)["journal.jsonl"]


@pytest.mark.parametrize("part", ["store", "model"])
@pytest.mark.parametrize("error", ENDINGS, ids=lambda e: type(e).__name__)
def test_a_job_without_a_finished_row_takes_the_corrected_file(tmp_path, expected, error, part):
  fake_folder.write_input(tmp_path, 1)
  with pytest.raises(type(error)):
    run_failing(tmp_path, error, part)
  fake_folder.write_input(tmp_path, 0)
  fake_folder.run(tmp_path)
  assert outputs(tmp_path) == expected


def test_a_job_of_bad_rows_takes_the_corrected_file_and_others_refuse_it(tmp_path, expected):
  (tmp_path / "in.jsonl").write_text('{"id": "a"}\n{"id": "b", "prompt": 5}\n')
  assert fake_folder.run(tmp_path).num_errors == 2
  fake_folder.write_input(tmp_path, 0)
  fake_folder.run(tmp_path)
  assert outputs(tmp_path) == expected
  before = job_files(tmp_path)
  fake_folder.write_input(tmp_path, 1)
  with pytest.raises(JobMismatch, match="input: .* or start anew with --overwrite"):
    fake_folder.run(tmp_path)
  assert job_files(tmp_path) == before and outputs(tmp_path) == expected
  fake_folder.run(tmp_path, overwrite=True)
  assert outputs(tmp_path) != expected
  assert {p.name for p in (tmp_path / "out.jsonl.job.1").iterdir()} == set(before)


@pytest.mark.parametrize("loss", [0, 1, 3])
def test_no_file_may_grow_and_then_it_may(tmp_path, expected, loss):
  """Writes fail at every size up to that of the largest file, as on a full disk."""
  fake_folder.write_input(tmp_path, 0)
  hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
  journal, kept, told = tmp_path / "out.jsonl.job/journal.jsonl", b"", set()
  sizes = sorted({size + loss for path in (tmp_path / "undisturbed").rglob("*") if path.is_file()
                  for size in (path.stat().st_size // 3, path.stat().st_size - 2)})
  for size in sizes:
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
      fake_folder.run(tmp_path)
    except command_line.ERRORS as e:
      told.add(type(e).__name__)
      assert str(tmp_path) in str(e)
    finally:
      resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    data = journal.read_bytes() if journal.exists() else b""
    assert data.startswith(kept) and data.endswith(b"\n"[:len(data)])
    kept = data if b'"output"' in data else b""
    assert not list(tmp_path.glob("*.tmp"))
  fake_folder.run(tmp_path)
  assert outputs(tmp_path) == expected
  assert {"OSError", "JournalError"} <= told


def test_outputs_of_one_stem_have_error_files_of_their_own(tmp_path):
  fake_folder.write_input(tmp_path, 0)
  for name in ("out.jsonl", "out.jsonl.gz", "out.parquet"):
    assert fake_folder.run(tmp_path, output=name).num_errors == 3
  assert {path.name for path in tmp_path.iterdir() if path.is_file()} == {
      "in.jsonl", "out.jsonl", "out.jsonl.gz", "out.parquet", "out.errors.jsonl",
      "out.errors.jsonl.gz", "out.errors.parquet"}
  for name in ("out.jsonl", "out.jsonl.gz", "out.parquet"):
    assert fake_folder.run(tmp_path, output=name).was_finished


def test_an_output_that_is_a_link_is_written_through(tmp_path, expected):
  fake_folder.write_input(tmp_path, 0)
  (tmp_path / "big").mkdir()
  (tmp_path / "out.jsonl").symlink_to("big/real.jsonl")
  fake_folder.run(tmp_path)
  assert (tmp_path / "out.jsonl").is_symlink() and outputs(tmp_path) == expected
  assert fake_folder.run(tmp_path).was_finished
  assert [path.name for path in (tmp_path / "big").iterdir()] == ["real.jsonl"]


def test_a_link_planted_for_the_temporary_file_is_not_followed(tmp_path, expected):
  fake_folder.write_input(tmp_path, 0)
  (tmp_path / "mine").write_text("mine")
  (tmp_path / "out.jsonl.job").mkdir()
  for name in ("out.jsonl.tmp", "out.errors.jsonl.tmp", "out.jsonl.job/manifest.json.tmp",
               "out.jsonl.job/requests.arrow.tmp", "out.jsonl.job/prepared.json.tmp"):
    (tmp_path / name).symlink_to(tmp_path / "mine")
  fake_folder.run(tmp_path)
  assert (tmp_path / "mine").read_text() == "mine" and outputs(tmp_path) == expected
  assert not list(tmp_path.rglob("*.tmp"))


def read_only(path):
  path.write_text("keep")
  path.chmod(0o444)


def other_job(path):
  path.with_name(path.name + ".job").mkdir()


@pytest.mark.parametrize("paths, make_fn, message", [
    (dict(input_path="p.jsonl"), os.mkfifo, "p.jsonl is a pipe or a device, which cannot be read twice"),
    (dict(error_path="p.jsonl"), os.mkfifo, "p.jsonl is a pipe, not a file"),
    (dict(output="p.jsonl"), os.mkfifo, "p.jsonl is a pipe, not a file"),
    (dict(error_path="p.jsonl"), read_only, r"p.jsonl cannot be written \(the file is read-only\)"),
    (dict(output="p.jsonl"), read_only, r"p.jsonl cannot be written \(the file is read-only\)"),
    (dict(error_path="p.jsonl"), other_job, "p.jsonl is the output of another job"),
    (dict(error_path="p.jsonl"), lambda path: path.hardlink_to(path.with_name("in.jsonl")),
     "p.jsonl is the input under another name"),
    (dict(error_path="p.jsonl"), lambda path: path.symlink_to("in.jsonl"), "name one file twice"),
    (dict(error_path="out.jsonl.job/journal.jsonl"), lambda path: (
        path.with_name("out.jsonl.job").mkdir()), "lies in the job's own folder"),
    (dict(error_path=f"{'n' * 300}.jsonl"), lambda path: None, "cannot be written .File name too long"),
    (dict(error_path="/proc/p.jsonl"), lambda path: None, "/proc/p.jsonl cannot be written")])
def test_paths_are_refused_before_the_work(tmp_path, paths, make_fn, message):
  fake_folder.write_input(tmp_path, 0)
  make_fn(tmp_path / "p.jsonl")
  before = sorted(tmp_path.rglob("*"))
  with pytest.raises(InputError, match=message) as error:
    run_failing(tmp_path, AssertionError("work"), "store", **{
        name: path if name == "output" else str(tmp_path / path) for name, path in paths.items()})
  assert "\n" not in str(error.value)
  assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_job_folder_that_cannot_be_written_is_noticed_before_the_work(tmp_path):
  fake_folder.write_input(tmp_path, 0)
  (tmp_path / "out.jsonl.job").mkdir(mode=0o500)
  with pytest.raises(PermissionError):
    run_failing(tmp_path, AssertionError("work"), "store")


def test_a_lock_that_was_removed_is_held_by_nobody_else(tmp_path, monkeypatch):
  real = files.open_regular

  def open_and_lose(path, flags=os.O_RDONLY, mode=0o666):
    fd = real(path, flags, mode)
    if pathlib.Path(path).name == "lock":
      os.unlink(path)  # as a job does that ends at this moment without a finished row
    return fd

  fake_folder.write_input(tmp_path, 0)
  monkeypatch.setattr(files, "open_regular", open_and_lose)
  with pytest.raises(command_line.ERRORS, match="was removed by another process: run the same"):
    fake_folder.run(tmp_path)


def test_a_limit_takes_the_first_rows_and_is_part_of_the_job(tmp_path):
  fake_folder.write_input(tmp_path, 0)
  with pytest.raises(Interrupted):
    fake_folder.run(tmp_path, limit=6, stop_after=2)
  finished = fake_folder.run(tmp_path, limit=6)
  assert (finished.num_outputs, finished.num_errors) == (5, 1)  # row 4 is bad
  kept = outputs(tmp_path)
  for limit, shown in ((9, "limit: 6 -> 9"), (5, "limit: 6 -> 5"), (None, r"limit: 6 -> \(absent\)")):
    with pytest.raises(JobMismatch, match=shown):
      fake_folder.run(tmp_path, limit=limit)
  assert fake_folder.run(tmp_path, limit=6).was_finished and outputs(tmp_path) == kept
  assert fake_folder.run(tmp_path, limit=1000, overwrite=True).num_outputs == 13
  with pytest.raises(ConfigError, match="limit=0 must be at least 1"):
    fake_folder.run(tmp_path, limit=0)
