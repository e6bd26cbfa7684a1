"""Reports on a job, running or done: a text on standard output and an HTML page.

    batchjax report --job=out.jsonl.job --html=report.html

Exit codes: 0 done, 2 refused or failed, with one line that says why, 130 interrupted.
"""

import pathlib

from absl import flags

from batchjax.report import summarize, to_text
from batchjax.report.page import write_page


def define_flags() -> None:
  """Those of `batchjax report`."""
  flags.DEFINE_string("job", None, "Job directory: <output>.job.", required=True)
  flags.DEFINE_string("html", None, "Where to write the page; report.html in the job directory if "
                      "left out.")


def main(args: flags.FlagValues) -> None:
  """Prints the text and writes the page."""
  page = pathlib.Path(args.html or pathlib.Path(args.job) / "report.html")
  print(to_text(summarize(args.job)))
  write_page(args.job, page)
  print(f"\npage      {page}")
