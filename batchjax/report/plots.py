"""The pictures of a report: matplotlib figures as SVG text that follows the page's colours.

Figures are drawn in placeholder colours that become CSS variables, so one SVG
reads well on a light and on a dark page. Text stays text, in the page's font.
"""

from collections.abc import Mapping, Sequence
import html
import io
import re
from types import MappingProxyType

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import EngFormatter, MaxNLocator, PercentFormatter
import numpy as np

from batchjax.report.metrics import RequestRecord, Run
from batchjax.report.sharing import node_names, PlanFile, row_starts, SharedNode
from batchjax.report.summary import StepTotals
from batchjax.report.terminal import printable

_INK, _MUTED, _GRID = "#010203", "#010204", "#010205"
_BLUE, _ORANGE, _GREEN, _VIOLET, _SHADE, _PAPER = (
    "#010206", "#010207", "#010208", "#010209", "#01020a", "#01020b")
_CSS = {_INK: "ink", _MUTED: "muted", _GRID: "grid", _BLUE: "blue", _ORANGE: "orange",
        _GREEN: "green", _VIOLET: "violet", _SHADE: "shade", _PAPER: "paper"}
WIDE, NARROW = 9.0, 4.4  # inches: of a picture on a screen, and on a telephone
_MAX_BINS = 240


class NothingToDraw(ValueError):
  """The data of a picture is not there yet; the message says what is missing."""


def over_time(runs: Sequence[Run], width_inches: float = WIDE) -> str:
  """Output and prompt throughput, rows and KV use against wall time, runs end to end.

  Raises:
    NothingToDraw: no step is recorded.
  """
  steps = [(offset, run.record, step) for offset, run in zip(_offsets(runs), runs)
           for step in run.steps]
  if not steps:
    raise NothingToDraw("no step is recorded")
  secs = np.array([offset + step.secs for offset, _, step in steps])
  begin = secs - np.array([step.step_secs for *_, step in steps])
  edges = np.linspace(0, max(secs[-1], 1e-3), min(_MAX_BINS, max(60, len(steps) // 4)) + 1)
  figure, axes = _figure(width_inches, 6.4, 4)
  for axis, values, title, color in (
      (axes[0], [s.generated_tokens for *_, s in steps], "Output tokens per second", _BLUE),
      (axes[1], [s.prompt_tokens for *_, s in steps], "Prompt tokens computed per second",
       _ORANGE)):
    axis.stairs(_rates(begin, secs, np.array(values), edges), edges, color=color, lw=1.6)
    _fill(axis, title, color)
  for axis, values, title, color in (
      (axes[2], [s.num_rows for *_, s in steps], "Rows running", _GREEN),
      (axes[3], [s.used_pages / max(r.num_pages, 1) for _, r, s in steps], "KV pool in use",
       _VIOLET)):
    axis.stairs(_most(begin, secs, np.array(values), edges), edges, color=color, lw=1.6)
    _fill(axis, title, color)
  axes[3].set_ylim(0, 1.05)
  axes[3].yaxis.set_major_locator(MaxNLocator(4))
  axes[3].yaxis.set_major_formatter(PercentFormatter(1.0))
  for axis in axes:
    axis.set_xlim(0, edges[-1])
    for offset in _offsets(runs)[1:]:
      axis.axvline(offset, color=_MUTED, lw=1, ls=(0, (3, 3)))
    axis.label_outer()
  axes[3].set_xlabel("seconds" if len(runs) < 2 else "seconds of all runs; dashed: a resume",
                     color=_MUTED)
  return _svg(figure)


def padding(buckets: Sequence[StepTotals], width_inches: float = WIDE) -> str:
  """Launched tokens of each bucket, useful ones and padding.

  Raises:
    NothingToDraw: no step is recorded.
  """
  if not buckets:
    raise NothingToDraw("no step is recorded")
  figure, (axis,) = _figure(width_inches, 0.7 + 0.32 * len(buckets), 1)
  places = np.arange(len(buckets))
  useful = np.array([b.num_tokens for b in buckets])
  launched = np.array([b.bucket_tokens for b in buckets])
  axis.barh(places, useful, height=0.62, color=_BLUE)
  axis.barh(places, launched - useful, left=useful, height=0.62, color=_SHADE)
  for place, bucket in zip(places, buckets):
    axis.annotate(f"{bucket.padding:.1%} padding", (bucket.bucket_tokens, place), (6, 0),
                  textcoords="offset points", va="center", color=_MUTED)
  axis.set_yticks(places, [b.name for b in buckets])
  axis.invert_yaxis()
  axis.set_xlim(0, launched.max() * (1 + 1.6 / width_inches))
  axis.xaxis.set_major_locator(MaxNLocator(round(width_inches)))
  axis.xaxis.set_major_formatter(EngFormatter(sep=""))
  axis.grid(axis="x", color=_GRID, lw=0.8)
  axis.spines["left"].set_visible(False)
  axis.set_xlabel("tokens launched: useful, then padding", color=_MUTED)
  return _svg(figure)


def sharing(plan: PlanFile, width_inches: float = WIDE) -> str:
  """The shared nodes as a map: rows across, prompt positions down, so area is tokens asked.

  A node is computed for one of its rows; the stronger its colour, the more tokens that saves. Its box
  has its name, and a tooltip with its figures and how its text begins.

  Raises:
    NothingToDraw: no node is shared.
  """
  if not plan.nodes:
    raise NothingToDraw("no prompt prefix is shared")
  figure, (axis,) = _figure(width_inches, 4.2, 1)
  starts, names = row_starts(plan.nodes), node_names(plan.nodes)
  num_rows = sum(node.num_rows for node in plan.nodes if node.parent < 0)
  depth = max(node.start + node.length for node in plan.nodes)
  most_saved = max(max(node.saved_tokens for node in plan.nodes), 1)
  for row, name, node in zip(starts, names, plan.nodes):
    alpha = 0.25 + 0.6 * (node.saved_tokens / most_saved) ** 0.5
    axis.add_patch(Rectangle((row, node.start), node.num_rows, node.length, lw=0))
    axis.patches[-1].set(facecolor=_BLUE, alpha=alpha)
    axis.add_patch(Rectangle((row, node.start), node.num_rows, node.length, fill=False, lw=0.8))
    axis.patches[-1].set(edgecolor=_PAPER, gid=f"node {name}")
    width, height = node.num_rows / num_rows * width_inches, node.length / depth
    # As much as the box holds: in words, or its name alone.
    for text, room in ((f"{name}: {node.length:,} tokens × {node.num_rows:,} rows", 2.2), (name, 0.4)):
      if width > room and height > 0.06:
        axis.text(row + node.num_rows / 2, node.start + node.length / 2, text, ha="center",
                  va="center", color=_INK)
        break
  axis.set_xlim(0, num_rows)
  axis.set_ylim(depth, 0)
  axis.set_xlabel("rows, in plan order", color=_MUTED)
  axis.set_ylabel("prompt position", color=_MUTED)
  axis.xaxis.set_major_locator(MaxNLocator(round(width_inches) - 1, integer=True))
  return _svg(figure, {f"node {name}": tooltip(name, node) for name, node in zip(names, plan.nodes)})


def tooltip(name: str, node: SharedNode) -> str:
  """A shared node in words."""
  text = f": “{printable(node.text)}…”" if node.text else ""
  return (f"prefix {name}, positions {node.start:,} to {node.start + node.length - 1:,}: "
          f"{node.length:,} tokens shared by {node.num_rows:,} rows, saves {node.saved_tokens:,} "
          f"tokens{text}")


def lengths(requests: Sequence[RequestRecord], width_inches: float = WIDE) -> str:
  """Histograms of prompt and output lengths.

  Raises:
    NothingToDraw: no request is answered yet.
  """
  if not requests:
    raise NothingToDraw("no request is answered yet")
  across = width_inches > NARROW
  figure, axes = _figure(width_inches, 2.5 if across else 4.4, 2, across)
  for axis, values, title, color in (
      (axes[0], [r.prompt_tokens for r in requests], "Prompt tokens", _ORANGE),
      (axes[1], [r.generated_tokens for r in requests], "Output tokens", _BLUE)):
    low, high = min(values), max(values) + 1
    edges = np.unique(np.linspace(low, high, min(40, high - low) + 1).round())
    axis.hist(values, bins=edges, color=color, alpha=0.85)
    axis.grid(axis="y", color=_GRID, lw=0.8)
    median = float(np.median(values))
    axis.axvline(median, color=_INK, lw=1, ls=(0, (3, 3)))
    axis.set_title(f"{title}: median {median:,.0f}, most {max(values):,}", loc="left",
                   color=_INK, fontsize=10)
    axis.yaxis.set_major_locator(MaxNLocator(4, integer=True))
  axes[0].set_ylabel("requests", color=_MUTED)
  return _svg(figure)


def _offsets(runs: Sequence[Run]) -> list[float]:
  return [float(sum(run.wall_secs for run in runs[:i])) for i in range(len(runs))]


def _rates(begin: np.ndarray, end: np.ndarray, amounts: np.ndarray,
           edges: np.ndarray) -> np.ndarray:
  """Amounts per second in each bin, each amount spread evenly from `begin` to `end`."""
  times = np.stack([begin, end], 1).ravel()
  done = np.cumsum(np.stack([np.zeros_like(amounts), amounts], 1).ravel())
  # Results read late may overlap in time by rounding; interpolation needs an order.
  return np.diff(np.interp(edges, np.maximum.accumulate(times), done)) / np.diff(edges)


def _most(begin: np.ndarray, end: np.ndarray, values: np.ndarray,
          edges: np.ndarray) -> np.ndarray:
  """The largest value of the steps that reach into each bin, 0 where none does."""
  first = np.searchsorted(end, edges[:-1], side="right")
  last = np.searchsorted(begin, edges[1:], side="left")
  return np.array([values[i:j].max(initial=0) for i, j in zip(first, last)])


def _figure(width_inches: float, height_inches: float, num_axes: int, across: bool = False
            ) -> tuple[Figure, list[Axes]]:
  figure = Figure(figsize=(width_inches, height_inches), layout="constrained")
  FigureCanvasSVG(figure)
  figure.patch.set_visible(False)
  shape = (1, num_axes) if across else (num_axes, 1)
  axes = figure.subplots(*shape, squeeze=False).ravel().tolist()
  for axis in axes:
    axis.patch.set_visible(False)
    axis.set_axisbelow(True)
    axis.tick_params(colors=_MUTED, length=0, labelsize=9)
    for name, spine in axis.spines.items():
      spine.set_visible(name in ("left", "bottom"))
      spine.set_color(_GRID)
  return figure, axes


def _fill(axis: Axes, title: str, color: str) -> None:
  stairs = axis.patches[-1].get_data()
  axis.stairs(stairs.values, stairs.edges, fill=True, color=color, alpha=0.16)
  axis.set_title(title, loc="left", color=_INK, fontsize=10)
  axis.set_ylim(0, max(float(np.max(stairs.values)) * 1.12, 1e-9))
  axis.yaxis.set_major_locator(MaxNLocator(3, integer=True))
  axis.yaxis.set_major_formatter(EngFormatter(sep=""))
  axis.grid(axis="y", color=_GRID, lw=0.8)


def _svg(figure: Figure, titles: Mapping[str, str] = MappingProxyType({})) -> str:
  """The figure as SVG text; `titles` are the tooltips of what has a name (`gid`)."""
  buffer = io.StringIO()
  with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "batchjax"}):
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
  svg = buffer.getvalue()
  svg = svg[svg.index("<svg"):]
  for color, name in _CSS.items():
    svg = svg.replace(color, f"var(--{name})")
  svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.DOTALL)
  for name, title in titles.items():
    svg = svg.replace(f'<g id="{name}">',
                      f'<g id="{name}" pointer-events="all"><title>{html.escape(title)}</title>')
  svg = re.sub(r' id="node [\d.]+"', "", svg)
  # Names such as axes_1 would repeat over the pictures of a page; nothing refers to them.
  return re.sub(r' id="[\w.]+_\d+"', "", svg)
