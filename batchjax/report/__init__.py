"""What a person sees of a job: progress while it runs, a summary and a page afterwards.

The page needs matplotlib and jinja2, which a run does not: it lies in `batchjax.report.page`.
"""

from batchjax.report.metrics import CompileRecord
from batchjax.report.metrics import METRICS_FILE
from batchjax.report.metrics import MetricsError
from batchjax.report.metrics import MetricsWriter
from batchjax.report.metrics import read_records
from batchjax.report.metrics import read_runs
from batchjax.report.metrics import Record
from batchjax.report.metrics import RequestRecord
from batchjax.report.metrics import Run
from batchjax.report.metrics import RunRecord
from batchjax.report.metrics import StartRecord
from batchjax.report.metrics import StepRecord
from batchjax.report.progress import Progress
from batchjax.report.sharing import PLAN_FILE
from batchjax.report.summary import RunFigures
from batchjax.report.summary import StepTotals
from batchjax.report.summary import summarize
from batchjax.report.summary import Summary
from batchjax.report.text import to_text
from batchjax.report.tracker import Snapshot
from batchjax.report.tracker import Tracker
