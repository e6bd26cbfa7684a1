"""Whatever is done to a job's folder, the job refuses on one line or writes the undisturbed bytes."""

import json
import os
import random
import shutil

import pytest

from batchjax.commands import command_line
from batchjax.jobs.signals import Interrupted
from tests.jobs import fake_folder

FILES = ("manifest.json", "journal.jsonl", "prepared.json", "requests.arrow", "metrics.jsonl", "lock")
NUM_CASES = 60


def flip(rng, data, foreign):
  data = bytearray(data)
  for _ in range(rng.choice((1, 1, 3, 20))):
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
  return bytes(data)


def double_a_line(rng, data, foreign):
  lines = data.splitlines(keepends=True)
  at = rng.randrange(len(lines))
  return b"".join(lines[:at] + [lines[at]] * 2 + lines[at + 1:])


def lose_a_line(rng, data, foreign):
  lines = data.splitlines(keepends=True)
  del lines[rng.randrange(len(lines))]
  return b"".join(lines)


def mix_in_a_line(rng, data, foreign):
  lines = data.splitlines(keepends=True)
  lines.insert(rng.randrange(len(lines) + 1), rng.choice(foreign.splitlines(keepends=True)))
  return b"".join(lines)


CHANGES = (flip, flip, double_a_line, lose_a_line, mix_in_a_line,
           lambda rng, data, foreign: data[:rng.randrange(len(data))],
           lambda rng, data, foreign: foreign, lambda rng, data, foreign: b"",
           lambda rng, data, foreign: data + rng.randbytes(rng.choice((1, 100))))


def replace(rng, path, other):
  path.unlink()
  rng.choice((lambda: None, path.mkdir, lambda: os.mkfifo(path), lambda: path.symlink_to(other),
              lambda: path.symlink_to(path.with_name("nowhere"))))()


def damage(rng, path, other):
  """Changes the file, or puts something else in its place; `other` is that of another job."""
  if rng.random() < 0.3 or not path.stat().st_size:
    replace(rng, path, other)
  else:
    path.write_bytes(rng.choice(CHANGES)(rng, path.read_bytes(), other.read_bytes()))


@pytest.fixture(autouse=True, scope="module", params=fake_folder.TASKS)
def task(request):
  """Every test is about jobs that complete and about jobs that score."""
  with fake_folder.of_task(request.param):
    yield


@pytest.fixture(scope="module")
def jobs(tmp_path_factory, task):
  """A folder with a finished job, one that was stopped, and a finished one of another input."""
  root = tmp_path_factory.mktemp("jobs")
  for name, seed, stop_after in (("done", 0, None), ("half", 0, 7), ("other", 1, None)):
    (root / name).mkdir()
    fake_folder.write_input(root / name, seed)
    try:
      fake_folder.run(root / name, stop_after)
    except Interrupted:
      assert name == "half"
  return root


def outputs(folder):
  return {name: (folder / name).read_bytes() for name in ("out.jsonl", "out.errors.jsonl")}


@pytest.mark.parametrize("seed", range(3))
def test_damaged_folders(tmp_path, jobs, seed):
  rng, refusals = random.Random(seed), 0
  expected = outputs(jobs / "done")
  assert expected != outputs(jobs / "other")
  for case in range(NUM_CASES):
    folder = tmp_path / str(case)
    shutil.copytree(jobs / rng.choice(("done", "half")), folder)
    told = []
    for name in rng.sample(FILES, rng.choice((1, 1, 2))):
      damage(rng, folder / "out.jsonl.job" / name, jobs / "other/out.jsonl.job" / name)
      told.append(name)
    if rng.random() < 0.3 and (folder / "out.jsonl").exists():
      (folder / "out.jsonl").write_bytes(flip(rng, expected["out.jsonl"], b""))
    journal = folder / "out.jsonl.job/journal.jsonl"
    before = journal.read_bytes() if journal.is_file() else None
    try:
      fake_folder.run(folder)
    except command_line.ERRORS as error:
      refusals += 1
      assert "\n" not in str(error) and str(folder) in str(error), (case, told)
      assert before is None or journal.read_bytes() == before, (case, told)
      fake_folder.run(folder, overwrite=True)
    assert outputs(folder) == expected, (case, told)
    shutil.rmtree(folder)
  assert 0.1 < refusals / NUM_CASES < 0.9


@pytest.mark.parametrize("state", ["done", "half"])
@pytest.mark.parametrize("name", ["prepared.json", "requests.arrow"])
def test_flipped_requests_are_made_again_and_what_is_done_is_kept(tmp_path, jobs, name, state, caplog):
  rng = random.Random(0)
  for case in range(10):
    folder = tmp_path / str(case)
    shutil.copytree(jobs / state, folder)
    path = folder / "out.jsonl.job" / name
    path.write_bytes(flip(rng, path.read_bytes(), b""))
    kept = (folder / "out.jsonl.job/journal.jsonl").read_bytes()
    caplog.clear()
    fake_folder.run(folder)
    assert caplog.text.count("the input is tokenized again") == 1
    assert f"{path} is damaged" in caplog.text
    assert outputs(folder) == outputs(jobs / "done")
    assert (folder / "out.jsonl.job/journal.jsonl").read_bytes().startswith(kept)


def test_the_journal_of_another_input_is_refused(tmp_path, jobs):
  shutil.copytree(jobs / "half", tmp_path / "job")
  shutil.copy(jobs / "other/out.jsonl.job/journal.jsonl", tmp_path / "job/out.jsonl.job")
  with pytest.raises(command_line.ERRORS, match="line 1 .it is of job"):
    fake_folder.run(tmp_path / "job")
  lines = [json.loads(line) for line in (
      tmp_path / "job/out.jsonl.job/journal.jsonl").read_bytes().splitlines()]
  assert len(lines) == fake_folder.NUM_ROWS
