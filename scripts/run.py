"""`batchjax run`, from a checkout."""

import signal

signal.signal(signal.SIGINT, signal.SIG_DFL)  # while modules load, Ctrl-C just ends the process

from batchjax.commands import main

if __name__ == "__main__":
  main("run")
