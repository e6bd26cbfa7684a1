"""`batchjax <command>`: the list of commands, their names, their help."""

import importlib
import os
import pathlib
import subprocess
import sys

import pytest

import batchjax
from batchjax import commands
from batchjax.commands import help_text

ROOT = pathlib.Path(__file__).parents[2]
# What `batchjax` alone and `--version` print before anything large is loaded.
PROGRAM = """
import sys
sys.argv = ["batchjax", *sys.argv[1:]]
from batchjax.commands import main
try:
  main()
finally:
  print(sorted({"jax", "numpy", "absl"} & set(sys.modules)), file=sys.stderr)
"""


def module_of(name):
  return importlib.import_module(f"batchjax.commands.{name.replace('-', '_')}")


def run(*args, capsys, monkeypatch):
  """Exit code and output of `batchjax` in this process, for what ends before a command is loaded."""
  monkeypatch.setattr(sys, "argv", ["batchjax", *args])
  monkeypatch.setattr("signal.signal", lambda *_: None)
  with pytest.raises(SystemExit) as stopped:
    commands.main()
  return stopped.value.code, *capsys.readouterr()


def test_each_command_is_a_module_and_a_script():
  files = lambda folder: {path.stem for path in (ROOT / folder).glob("*.py")}
  names = {name.replace("-", "_") for name in commands.COMMANDS}
  assert files("scripts") == names
  assert files("batchjax/commands") == names | {"__init__", "command_line", "help_text", "packaged"}
  for name in commands.COMMANDS:  # in one process: none defines a flag before it is launched
    assert f"\n    batchjax {name} --" in module_of(name).__doc__.replace("JAX_PLATFORMS=cpu ", "")


@pytest.mark.parametrize("args", [(), ("--help",), ("-h",), ("help",)])
def test_alone_it_lists_the_commands(args, capsys, monkeypatch):
  code, out, err = run(*args, capsys=capsys, monkeypatch=monkeypatch)
  assert (code, err) == (0, "")
  assert [line.split()[0] for line in out.splitlines() if line.startswith("  ")] == list(
      commands.COMMANDS)
  assert max(map(len, out.splitlines())) <= 100


@pytest.mark.parametrize("name, hint", [
    ("rnu", "did you mean run?"), ("tpu_reprot", "did you mean tpu-report?"),
    ("--confg=x", "batchjax --help lists them"), ("\x1b[2J", r"'\x1b[2J' is no command")])
def test_an_unknown_command_is_one_line(name, hint, capsys, monkeypatch):
  code, out, err = run(name, capsys=capsys, monkeypatch=monkeypatch)
  assert (code, out) == (2, "") and err.startswith("error: ") and err.count("\n") == 1 and hint in err


def test_it_answers_without_loading_what_commands_need():
  done = subprocess.run([sys.executable, "-c", PROGRAM, "--version"], capture_output=True, text=True,
                        check=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
  assert (done.stdout, done.stderr) == (f"batchjax {batchjax.__version__}\n", "[]\n")


def test_every_field_of_the_configuration_is_told():
  fields = help_text.fields()
  assert all(field.kind and help_text.meaning(field) for field in fields.values())
  assert fields["engine.max_rows"][1:] == ("max_rows", "int", "64")
  assert help_text.meaning(fields["engine.max_rows"]) == "most samples decoded at once."
  assert fields["engine.attention"].kind == "str"  # or None
  assert fields["sampling.logit_bias"].kind == "((int, float), ...)"
  assert "hf or gguf" in fields["model.format"].kind


@pytest.mark.parametrize("columns", [60, 80, 120])
def test_help_fits_the_terminal(columns, monkeypatch):
  monkeypatch.setenv("COLUMNS", str(columns))
  lines = list(help_text.entries((name, help_text.meaning(field))
                                 for name, field in help_text.fields().items()))
  assert max(map(len, lines)) <= min(columns, 100)
  assert sum(line.startswith(" " * 6) for line in lines) > len(help_text.fields())
