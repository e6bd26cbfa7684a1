"""Reports on a job, running or done: a text on standard output and an HTML page.

    python scripts/report.py --job=out.jsonl.job --html=report.html
"""

import pathlib

from absl import app
from absl import flags

from batchjax.report import MetricsError, summarize, to_text
from batchjax.report.page import write_page

_JOB = flags.DEFINE_string("job", None, "Job directory: <output>.job.", required=True)
_HTML = flags.DEFINE_string("html", None, "Where to write the page; report.html in the job "
                            "directory if left out.")


def main(argv: list[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f"unexpected arguments: {argv[1:]}")
  page = pathlib.Path(_HTML.value or pathlib.Path(_JOB.value) / "report.html")
  try:
    print(to_text(summarize(_JOB.value)))
    write_page(_JOB.value, page)
  except (FileNotFoundError, MetricsError) as error:
    raise app.UsageError(str(error)) from error
  print(f"\npage      {page}")


if __name__ == "__main__":
  app.run(main)
