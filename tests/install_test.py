"""What is installed: the checkout where tests run, and the built wheel, which must run by itself."""

import os
import pathlib
import shutil
import subprocess
import sys
import venv
import zipfile

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PACKAGES = ("batchjax", "pallas_kernels")
JOB = """
import json, pathlib
import batchjax, pallas_kernels
from batchjax import report
from batchjax.jobs.loaders import Loaders
from batchjax.report.page import write_page
from batchjax.testing.fake_tokenizer import FakeTokenizer
from pallas_kernels.shared_prefix_attention import gpu, tpu

print(pathlib.Path(batchjax.__file__).parents[1], pathlib.Path(pallas_kernels.__file__).parents[1])
pathlib.Path("in.jsonl").write_text(
    '{"id": "a", "prompt": "What is this?", "logit_bias": {"40": 100}}\\n{"id": "b"}\\n')
tuned = gpu.tuned("nvidia_h100"), *map(tpu.tuned, tpu.GENERATIONS.values())
assert all(tuned)
config = batchjax.JobConfig(
    model=batchjax.ModelSource(format="random", shape="tiny_llama"),
    engine=batchjax.EngineConfig(max_rows=2, max_step_tokens=16, page_size=8, num_pages=16,
                                 max_buckets=1, compilation_cache_dir=""),
    sampling=batchjax.SamplingParams(max_tokens=4))
done = batchjax.run(config, "in.jsonl", "out.jsonl", quiet=True,
                    loaders=Loaders(tokenizer=lambda source: FakeTokenizer()))
row, = map(json.loads, pathlib.Path("out.jsonl").read_text().splitlines())
assert (done.num_outputs, done.num_errors) == (1, 1)
assert FakeTokenizer().decode([40] * 4) in json.dumps(row)
write_page("out.jsonl.job", "page.html")
assert pathlib.Path("page.html").read_text().startswith("<!doctype html>")
"""


def python(folder: pathlib.Path, *args) -> str:
  """What a Python process in a folder prints, without a path to the checkout."""
  environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
  done = subprocess.run(list(map(str, args)), cwd=folder, env=environment, capture_output=True,
                        text=True, check=False)
  assert done.returncode == 0, done.stdout + done.stderr
  return done.stdout


def test_processes_in_other_folders_import_this_checkout_or_nothing(tmp_path):
  origin = python(tmp_path, sys.executable, "-c", "from importlib.util import find_spec as find; "
                  "print(*(spec.origin for name in ('batchjax', 'pallas_kernels') "
                  "if (spec := find(name))))").split()
  assert origin in ([], [str(ROOT / name / "__init__.py") for name in PACKAGES])


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> pathlib.Path:
  """Of a copy of the tree: what an earlier build left in `build` would go in as well."""
  pytest.importorskip("setuptools", minversion="70.1", reason="builds the wheel")
  folder = tmp_path_factory.mktemp("wheel")
  for name in PACKAGES:
    shutil.copytree(ROOT / name, folder / "tree" / name,
                    ignore=shutil.ignore_patterns("__pycache__"))
  for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
    shutil.copy(ROOT / name, folder / "tree")
  python(folder / "tree", sys.executable, "-c",
         f"from setuptools import build_meta; build_meta.build_wheel({str(folder)!r})")
  return next(folder.glob("*.whl"))


def test_wheel_holds_every_file_of_the_packages(wheel):
  held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
  packages = {str(path.relative_to(ROOT)) for name in PACKAGES for path in (ROOT / name).rglob("*")
              if path.is_file() and path.suffix not in (".md", ".pyc")
              and "configs" not in path.relative_to(ROOT).parts}
  configs = {f"batchjax/{path.relative_to(ROOT)}" for path in (ROOT / "configs").rglob("*")
             if path.is_file() and path.suffix != ".pyc"}
  assert configs and held == packages | configs


@pytest.fixture(scope="module")
def environment(wheel, tmp_path_factory) -> pathlib.Path:
  """With the wheel installed."""
  environment = tmp_path_factory.mktemp("environment")
  venv.create(environment)
  site, = environment.glob("lib/python*/site-packages")
  # Dependencies only: an editable install works through a .pth of its own, which is not read here.
  (site / "dependencies.pth").write_text(
      "\n".join(path for path in sys.path if path.endswith("-packages")))
  python(environment, sys.executable, "-m", "pip", "--python", environment / "bin/python", "install",
         "--quiet", "--disable-pip-version-check", "--no-deps", "--no-index", wheel)
  return environment


def test_installed_wheel_runs_a_job_and_writes_its_page(environment, tmp_path):
  site, = environment.glob("lib/python*/site-packages")
  printed = python(tmp_path, environment / "bin/python", "-c", JOB)
  assert printed.splitlines()[0] == f"{site} {site}"


def test_installed_console_script_finds_a_configuration_and_its_input(environment, tmp_path):
  batchjax = environment / "bin/batchjax"
  show = "from importlib.metadata import metadata as m; print(m('batchjax')['Version'])"
  version = python(tmp_path, environment / "bin/python", "-c", show)
  assert python(tmp_path, batchjax, "--version") == f"batchjax {version}"
  assert python(tmp_path, environment / "bin/python", "-m", "batchjax") == python(tmp_path, batchjax)
  plan = python(tmp_path, batchjax, "plan", "--config=smollm2_135m", "--input=gsm8k_64", "--limit=3")
  assert plan.startswith("rows      3: 3 requests, 0 errors")


def test_readme_is_the_description_of_the_wheel(wheel):
  with zipfile.ZipFile(wheel) as held:
    name, = (name for name in held.namelist() if name.endswith(".dist-info/METADATA"))
    assert held.read(name).decode().endswith((ROOT / "README.md").read_text())
