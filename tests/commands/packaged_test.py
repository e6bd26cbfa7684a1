"""Configurations and example inputs by name."""

import pathlib

import pytest

from batchjax.commands import packaged
from batchjax.config import ConfigError

ROOT = pathlib.Path(__file__).parents[2]


def test_names_are_those_of_the_folder():
  assert packaged.configs() == sorted(path.stem for path in (ROOT / "configs").glob("*.py"))
  assert [f"{name}.jsonl" for name in packaged.examples()] == sorted(
      path.name for path in (ROOT / "configs/examples").glob("*.jsonl"))


@pytest.mark.parametrize("argv", [
    ["--config=smollm2_135m"], ["-config", "smollm2_135m"], ["--config=smollm2_135m:small"],
    ["--config=configs/smollm2_135m.py"], ["--quiet", "--config", "./there", "--config.seed=1"], []])
def test_a_name_becomes_its_path_and_a_path_stays(argv):
  found = packaged.with_config_path(["run", *argv])
  path = pathlib.Path(packaged.config_path(found).split(":")[0])
  if "smollm2_135m" in "".join(argv):
    assert path.read_bytes() == (ROOT / "configs/smollm2_135m.py").read_bytes()
  if not argv or "/" in argv[-1] or "/" in argv[0] or "./there" in argv:
    assert found == ["run", *argv]
  assert packaged.config_path(found).endswith(":small") == ("small" in "".join(argv))


def test_a_file_goes_before_a_name_and_no_name_is_an_error_that_lists_them(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  (tmp_path / "smollm2_135m").touch()
  (tmp_path / "gsm8k_64").touch()
  assert packaged.with_config_path(["run", "--config=smollm2_135m"])[1] == "--config=smollm2_135m"
  assert packaged.input_path("gsm8k_64") == "gsm8k_64"
  with pytest.raises(ConfigError, match="--config=smollm is neither a file nor .* llama3_8b"):
    packaged.with_config_path(["run", "--config=smollm"])
  with pytest.raises(ConfigError, match="--input=gsm8k is neither a file nor .* gsm8k_64"):
    packaged.input_path("gsm8k")


def test_an_example_is_found_by_name():
  assert (pathlib.Path(packaged.input_path("gsm8k_64")).read_bytes()
          == (ROOT / "configs/examples/gsm8k_64.jsonl").read_bytes())
  for path in ("in.jsonl", "gs://bucket/in", "folder/gsm8k_64"):
    assert packaged.input_path(path) == path
