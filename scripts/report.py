"""Reports on a job, running or done: a text on standard output and an HTML page.

    python scripts/report.py --job=out.jsonl.job --html=report.html

Exit codes: 0 done, 2 refused or failed, with one line that says why, 130 interrupted.
"""

import signal

signal.signal(signal.SIGINT, signal.SIG_DFL)  # while modules load, Ctrl-C just ends the process

import pathlib

from absl import flags

from batchjax.jobs import command_line
from batchjax.report import summarize, to_text
from batchjax.report.page import write_page

_JOB = flags.DEFINE_string("job", None, "Job directory: <output>.job.", required=True)
_HTML = flags.DEFINE_string("html", None, "Where to write the page; report.html in the job "
                            "directory if left out.")


def main() -> None:
  page = pathlib.Path(_HTML.value or pathlib.Path(_JOB.value) / "report.html")
  print(to_text(summarize(_JOB.value)))
  write_page(_JOB.value, page)
  print(f"\npage      {page}")


if __name__ == "__main__":
  command_line.launch(main)
