"""A job whose model is named on the Hub stays with the commit that it began with."""

import json
import pathlib

from huggingface_hub import constants
import pytest

from batchjax.jobs.job import JobMismatch
from batchjax.jobs.signals import Interrupted
from tests import fake_hub
from tests.jobs import fake_folder

LLAMA = pathlib.Path(__file__).parents[1] / "goldens/llama"
A, B = "a" * 40, "b" * 40


@pytest.fixture
def cache(tmp_path, monkeypatch):
  """Without network."""
  monkeypatch.chdir(tmp_path)
  monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
  monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
  fake_folder.write_input(tmp_path, 0)
  fake_hub.write_model(tmp_path / "model", LLAMA)
  return tmp_path / "cache"


def manifest(folder):
  return json.loads((folder / "out.jsonl.job/manifest.json").read_text())


def test_a_resumed_job_keeps_its_commit(cache, tmp_path):
  fake_hub.add_to_cache(cache, "org/tiny", A, tmp_path / "model")
  with pytest.raises(Interrupted):
    fake_folder.run(tmp_path, 3, model="org/tiny")
  before = manifest(tmp_path)
  assert before["identity"]["model"]["hub"] == before["versions"]["org/tiny"] == f"org/tiny@{A}"
  assert "model.safetensors" in before["identity"]["model"]["files"]

  (tmp_path / "model/generation_config.json").write_text("{}")
  fake_hub.add_to_cache(cache, "org/tiny", B, tmp_path / "model")
  (cache / "models--org--tiny/snapshots" / A / "of_another_program.bin").write_bytes(b"x")
  fake_folder.run(tmp_path, model="org/tiny")
  assert {**manifest(tmp_path), "finished": None, "crc": ""} == {**before, "crc": ""}
  whole = (tmp_path / "out.jsonl").read_bytes()
  assert fake_folder.run(tmp_path, model=f"org/tiny@{A}").was_finished
  with pytest.raises(JobMismatch, match=f'model.hub: "org/tiny@{A}" -> "org/tiny@{B}"'):
    fake_folder.run(tmp_path, model=f"org/tiny@{B}")

  fake_folder.run(tmp_path, model="org/tiny", overwrite=True)
  assert manifest(tmp_path)["versions"]["org/tiny"] == f"org/tiny@{B}"
  assert (tmp_path / "out.jsonl").read_bytes() == whole  # of the fake model
  fake_folder.run(tmp_path, output="other.jsonl", model=f"org/tiny@{A}")


def test_a_lost_manifest_is_made_again_from_the_commit_that_is_named(cache, tmp_path):
  fake_hub.add_to_cache(cache, "org/tiny", A, tmp_path / "model")
  with pytest.raises(Interrupted):
    fake_folder.run(tmp_path, 3, model="org/tiny")
  (tmp_path / "out.jsonl.job/manifest.json").unlink()
  fake_folder.run(tmp_path, model=f"org/tiny@{A}")
  assert manifest(tmp_path)["identity"]["model"]["hub"] == f"org/tiny@{A}"
