"""The command line: `batchjax <command>`, a module of this room for each."""

import difflib
import importlib
import signal
import sys
from typing import NoReturn

from batchjax import __version__

COMMANDS = {
    "run": "completes a file of requests; the same command again resumes it",
    "plan": "shows sharing, memory, shapes and predicted seconds without loading weights",
    "score": "log-probabilities of given continuations",
    "report": "text and one HTML page about a finished or running job",
    "convert": "between Hugging Face safetensors, GGUF (read) and Orbax",
    "bench": "times a seeded workload and states its floor",
    "compare": "times batchjax beside Hugging Face transformers",
    "tpu-report": "compiles a model's steps for a TPU that need not be there",
}
_OVERVIEW = "\n".join([
    "batchjax <command> --<flag>=<value> ...", "",
    *(f"  {name:10}  {meaning}" for name, meaning in COMMANDS.items()), "",
    "batchjax <command> --help lists the flags of a command, batchjax --version tells the version."])


def main(name: str | None = None) -> NoReturn:
  """Runs a command and exits with its code; where no name is given the first argument is it."""
  signal.signal(signal.SIGINT, signal.SIG_DFL)  # while modules load, Ctrl-C just ends the process
  if name is None:
    program, *arguments = sys.argv
    name, *arguments = arguments or ["--help"]
    sys.argv = [program, *arguments]
  if name in ("-h", "--help", "--helpfull", "help"):
    print(_OVERVIEW)
    sys.exit(0)
  if name == "--version":
    print(f"batchjax {__version__}")
    sys.exit(0)
  if (name := name.replace("_", "-")) not in COMMANDS:
    near = difflib.get_close_matches(name, COMMANDS, n=1)
    hint = f"did you mean {near[0]}?" if near else "batchjax --help lists them"
    print(f"error: {name!r} is no command of batchjax: {hint}", file=sys.stderr)
    sys.exit(2)
  # Modules of commands load JAX, which the above need not wait for.
  module = importlib.import_module(f"batchjax.commands.{name.replace('-', '_')}")
  importlib.import_module("batchjax.commands.command_line").launch(module)
