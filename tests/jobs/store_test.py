"""A job whose files are in a cloud store: its state stays on this machine, what is final is copied."""

import pathlib
import sys

import pytest

from batchjax.io.paths import InputError
from batchjax.jobs import folder
from batchjax.jobs.folder import JobError
from batchjax.jobs.job import JobMismatch
from batchjax.jobs.signals import Interrupted
from tests import fake_store
from tests.jobs import fake_folder

OUTPUT = "gs://bucket/dir/out.jsonl"


@pytest.fixture
def store(tmp_path, monkeypatch):
  """The bucket; the home folder is elsewhere in `tmp_path`."""
  monkeypatch.setenv("HOME", str(tmp_path / "home"))
  fake_store.install(tmp_path / "store")
  fake_folder.write_input(tmp_path, 0)
  yield tmp_path / "store/bucket"
  fake_store.remove()


def run(tmp_path, *args, output=OUTPUT, **kwargs):
  return fake_folder.run(tmp_path, *args, output=output, **kwargs)


def held(root):
  return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


@pytest.fixture
def expected(tmp_path, store):
  """What a job on this machine writes."""
  fake_folder.run(tmp_path, output="local.jsonl")
  return {f"dir/out{name}.jsonl": (tmp_path / f"local{name}.jsonl").read_bytes()
          for name in ("", ".errors")}


def test_final_files_are_copied_and_the_state_is_local(tmp_path, store, expected, caplog):
  caplog.set_level("INFO", logger="absl")
  with pytest.raises(Interrupted):
    run(tmp_path, 3)
  assert held(store) == {}
  state = tmp_path / "home/.local/state/batchjax/gs/bucket/dir/out.jsonl.job"
  assert (state / "journal.jsonl").exists() and f"keeps its state in {state}" in caplog.text
  run(tmp_path)
  assert held(store) == expected and not list(state.glob("staged*"))
  assert run(tmp_path).was_finished


def test_the_input_may_be_there_too(tmp_path, store, expected):
  (store / "in.jsonl").parent.mkdir(parents=True, exist_ok=True)
  (tmp_path / "in.jsonl").rename(store / "in.jsonl")
  run(tmp_path, input_path="gs://bucket/in.jsonl")
  (store / "in.jsonl").rename(tmp_path / "in.jsonl")
  assert held(store) == expected


@pytest.mark.parametrize("broken", ["write", "half", "rename"])
def test_what_was_not_copied_is_copied_by_the_same_command(tmp_path, store, expected, broken, monkeypatch):
  finish = folder.files.write_rows

  def write_rows(*args):
    fake_store.FolderStore.broken = {broken}  # once the job is done
    finish(*args)

  with monkeypatch.context() as patch:
    patch.setattr(folder.files, "write_rows", write_rows)
    with pytest.raises(InputError, match=r"gs://bucket/dir/out.jsonl cannot be written \(.*\): check its name, "
                       "your access to the store and the network; the file is whole in .*staged.out.jsonl, "
                       "and the same command again copies it") as error:
      run(tmp_path)
  staged, = (tmp_path / "home").rglob("staged.*")
  assert "\n" not in str(error.value) and staged.read_bytes() == expected["dir/out.jsonl"]
  assert not (store / "dir/out.jsonl").exists()
  fake_store.FolderStore.broken = set()
  monkeypatch.setattr(fake_folder, "complete", None)  # nothing runs again
  assert not run(tmp_path).was_finished
  assert held(store) == expected and not staged.exists()


def test_what_others_changed_in_the_store_is_copied_again(tmp_path, store, expected):
  run(tmp_path)
  (store / "dir/out.jsonl").write_text("cut")
  assert not run(tmp_path).was_finished and held(store) == expected
  (store / "dir/out.errors.jsonl").unlink()
  assert not run(tmp_path).was_finished and held(store) == expected


def test_a_store_that_takes_nothing_is_noticed_before_the_work(tmp_path, store):
  (store / "dir/out.jsonl").mkdir(parents=True)
  with pytest.raises(InputError, match="out.jsonl is a directory: name the file to write"):
    run(tmp_path)
  fake_store.FolderStore.broken = {"write"}
  with pytest.raises(InputError, match=r"gs://b/out.jsonl cannot be written \(StoreError: cannot write\)"):
    run(tmp_path, output="gs://b/out.jsonl")
  fake_store.FolderStore.broken = {"open"}
  with pytest.raises(InputError, match=r"gs://bucket/in.jsonl does not exist"):
    run(tmp_path, output="out.jsonl", input_path="gs://bucket/in.jsonl")
  (store / "in.jsonl").write_text("{}")
  with pytest.raises(InputError, match=r"gs://bucket/in.jsonl cannot be opened \(StoreError: cannot open\)"):
    run(tmp_path, output="out.jsonl", input_path="gs://bucket/in.jsonl")
  assert not (tmp_path / "home").exists() and not (tmp_path / "out.jsonl.job").exists()


def test_without_the_library_of_a_store(tmp_path, store, monkeypatch):
  fake_store.remove()
  monkeypatch.setitem(sys.modules, "gcsfs", None)
  (tmp_path / "home").mkdir()
  for paths in (dict(output=OUTPUT), dict(output="out.jsonl", input_path="gs://bucket/in.jsonl")):
    with pytest.raises(InputError, match=r"gs://bucket/.* cannot be (written|opened) \(.*\): pip install "
                       r"'batchjax\[gcs\]'"):
      run(tmp_path, **paths)


def test_the_folder_of_a_job(tmp_path, store, monkeypatch):
  home = tmp_path / "home/.local/state/batchjax"
  assert folder.directory_of("a/out.jsonl") == pathlib.Path("a/out.jsonl.job")
  assert folder.directory_of("s3://b/../../x.jsonl") == home / "s3/x.jsonl.job"
  assert folder.directory_of("s3://b/x.jsonl", "~/j") == tmp_path / "home/j"
  with pytest.raises(JobError, match="job_dir=gs://b/j: a job's folder is on this machine"):
    folder.directory_of("x.jsonl", "gs://b/j")
  (tmp_path / "full").mkdir()
  (tmp_path / "full/manifest.json").write_text("of something else")
  with pytest.raises(JobError, match="full is no job's folder and not empty: name another"):
    run(tmp_path, job_dir=str(tmp_path / "full"))
  assert held(tmp_path / "full") == {"manifest.json": b"of something else"}


def test_a_job_dir_is_used_wherever_the_output_goes(tmp_path, store, expected):
  with pytest.raises(Interrupted):
    run(tmp_path, 3, job_dir=str(tmp_path / "deep/state"))
  assert (tmp_path / "deep/state/journal.jsonl").exists() and not (tmp_path / "home").exists()
  run(tmp_path, job_dir=str(tmp_path / "deep/state"))
  run(tmp_path, output="again.jsonl", job_dir=str(tmp_path / "deep/state"))
  assert held(store) == expected
  assert (tmp_path / "again.jsonl").read_bytes() == expected["dir/out.jsonl"]
  fake_folder.write_input(tmp_path, 1)
  with pytest.raises(JobMismatch):
    run(tmp_path, job_dir=str(tmp_path / "deep/state"))
  run(tmp_path, job_dir=str(tmp_path / "deep/state"), overwrite=True)
  assert (tmp_path / "deep/state.1/journal.jsonl").exists() and held(store) != expected
