"""A job killed with SIGKILL at random moments writes what an undisturbed one does."""

import collections
import json
import multiprocessing
import os
import pathlib
import random
import time

import fake_job
import pytest

# How long after the begin of a phase a kill comes at most; finishing is three files and a manifest.
_PHASE_SECS = {"starting": 0.3, "compiling": 0.8, "running": 0.4, "finishing": 0.35}


@pytest.fixture
def start(monkeypatch, scores):
  """Starts the slow job in a process of its own, forked where jax is imported already."""
  monkeypatch.setenv("JAX_PLATFORMS", "cpu")
  # The fork server preloads from PYTHONPATH only, and passes over what it does not find.
  folder = pathlib.Path(fake_job.__file__).parent
  monkeypatch.setenv("PYTHONPATH", os.pathsep.join(
      (str(folder), str(folder.parents[1]), os.environ.get("PYTHONPATH", ""))))
  context = multiprocessing.get_context("forkserver")
  context.set_forkserver_preload(["fake_job"])

  def start_job(folder, cache):
    phases, child_end = context.Pipe(duplex=False)
    process = context.Process(target=fake_job.run_slowly, args=(
        str(folder), str(cache), scores, child_end))
    process.start()
    child_end.close()
    return process, phases
  return start_job


def finish(start, folder, cache):
  process, _ = start(folder, cache)
  process.join()
  assert process.exitcode == 0


def wait_for(phases, phase):
  """True once the job enters the phase, False if it ends before."""
  try:
    while phases.recv() != phase:
      pass
  except EOFError:
    return False
  return True


@pytest.mark.parametrize("scores, num_kills", [(False, 20), (True, 5)], ids=["complete", "score"])
def test_kill_at_random_moments(tmp_path, start, scores, num_kills):
  rng, kills, cache = random.Random(0), collections.Counter(), tmp_path / "cache"
  expected = {}
  for seed in (0, 1):
    folder = tmp_path / f"undisturbed{seed}"
    folder.mkdir()
    fake_job.write_input(folder / "in.jsonl", seed, scores)
    finish(start, folder, cache)
    expected[seed] = {name: (folder / name).read_bytes()
                      for name in ("out.jsonl", "out.errors.jsonl")}
    rows = expected[seed]["out.jsonl"].splitlines(), expected[seed]["out.errors.jsonl"].splitlines()
    assert [len(lines) for lines in rows] == [fake_job.NUM_ROWS - fake_job.NUM_BAD,
                                              fake_job.NUM_BAD]
  assert expected[0] != expected[1]

  jobs = 0
  while kills.total() < num_kills:
    jobs += 1
    seed, folder = jobs % 2, tmp_path / f"killed{jobs}"
    folder.mkdir()
    fake_job.write_input(folder / "in.jsonl", seed, scores)
    for phase in [p for p in fake_job.PHASES for _ in range(2 if p == "running" else 1)]:
      process, phases = start(folder, cache)
      if wait_for(phases, phase):
        time.sleep(rng.uniform(0, _PHASE_SECS[phase]))
      process.kill()
      process.join()
      if process.exitcode == 0:  # it was faster, and there is nothing left to kill
        break
      assert process.exitcode == -9
      kills[phase] += 1
    finish(start, folder, cache)
    for name, data in expected[seed].items():
      assert (folder / name).read_bytes() == data, f"job {jobs}, kills so far {kills}"
    assert not list(folder.rglob("*.tmp"))
    ids = [json.loads(line)["index"]
           for line in (folder / "out.jsonl.job/journal.jsonl").read_text().splitlines()]
    assert sorted(ids) == list(range(fake_job.NUM_ROWS))
  print(f"{kills.total()} kills of {jobs} jobs: {dict(kills)}")
  assert len(kills) == len(fake_job.PHASES), kills
