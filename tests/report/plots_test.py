"""The pictures: right numbers, valid SVG, colours of the page."""

import dataclasses
import re
import xml.etree.ElementTree as ElementTree

from hypothesis import given
from hypothesis import strategies as st
import matplotlib
import numpy as np
import pytest

from batchjax.report import plots, read_runs, StepTotals
from batchjax.report.sharing import read_plan_file


def _texts(svg: str) -> list[str]:
  return [element.text for element in ElementTree.fromstring(svg).iter()
          if element.tag.endswith("text")]


def test_rates_spread_each_amount_over_its_time():
  begin, end = np.array([1.0, 3.0]), np.array([2.0, 5.0])
  rates = plots._rates(begin, end, np.array([10, 20]), np.array([0.0, 1.0, 2.0, 3.0, 4.0, 5.0]))
  np.testing.assert_allclose(rates, [0, 10, 0, 10, 10])


def test_rates_keep_the_total_when_steps_overlap():
  begin, end = np.array([0.0, 0.9, 1.5]), np.array([1.0, 2.0, 3.0])
  edges = np.linspace(0, 3, 8)
  rates = plots._rates(begin, end, np.array([5, 7, 11]), edges)
  np.testing.assert_allclose((rates * np.diff(edges)).sum(), 23)
  assert (rates >= 0).all()


_STEPS = st.lists(st.tuples(st.floats(0, 2), st.floats(0.1, 2), st.integers(0, 99)), min_size=1,
                  max_size=12)


@given(_STEPS, st.integers(1, 20))
def test_rates_and_peaks_hold_for_any_steps(steps, num_bins):
  gaps, durations, amounts = (np.array(column) for column in zip(*steps))
  end = np.cumsum(gaps + durations)
  begin = end - durations
  edges = np.linspace(0, end[-1], num_bins + 1)
  rates = plots._rates(begin, end, amounts, edges)
  np.testing.assert_allclose((rates * np.diff(edges)).sum(), amounts.sum(), atol=1e-6)
  for low, high, most in zip(edges[:-1], edges[1:], plots._most(begin, end, amounts, edges)):
    inside = [a for b, e, a in zip(begin, end, amounts) if e > low and b < high]
    assert most == max(inside, default=0)


def test_most_is_the_peak_of_each_bin_and_zero_in_a_gap():
  begin, end = np.array([0.0, 1.0, 5.0]), np.array([1.0, 2.0, 6.0])
  most = plots._most(begin, end, np.array([3, 9, 4]), np.array([0.0, 1.5, 2.5, 4.0, 5.5]))
  assert most.tolist() == [9, 9, 0, 4]


def test_over_time_marks_a_resume(job_dir):
  runs = read_runs(job_dir / "metrics.jsonl")
  svg = plots.over_time(runs)
  assert "seconds of all runs; dashed: a resume" in _texts(svg)
  texts = _texts(plots.over_time(runs[:1]))
  assert {"Output tokens per second", "Prompt tokens computed per second", "Rows running",
          "KV pool in use", "seconds"} <= set(texts)


def test_padding_is_labelled_per_bucket():
  texts = _texts(plots.padding([StepTotals("decode 8", 1, 16, 2.0, 48, 128),
                                StepTotals("mixed 64x8", 1, 1, 2.0, 48, 64)]))
  assert {"decode 8", "62.5% padding", "mixed 64x8", "25.0% padding"} <= set(texts)


def test_sharing_draws_two_boxes_a_node_and_labels_large_ones(job_dir):
  plan = read_plan_file(job_dir / "plan.json")
  texts = _texts(plots.sharing(plan))
  assert "1: 50 tokens × 4 rows" in texts and "1.2: 10 tokens × 2 rows" in texts
  narrow = _texts(plots.sharing(plan, plots.NARROW))
  assert "1: 50 tokens × 4 rows" in narrow and "1.2" in narrow, "a name where words do not fit"
  one = dataclasses.replace(plan, nodes=plan.nodes[:1])
  boxes = [plots.sharing(p).count("<path") for p in (plan, one)]
  assert boxes[0] - boxes[1] == 2 * 2


def test_boxes_have_tooltips_with_names_figures_and_text(job_dir):
  svg = ElementTree.fromstring(plots.sharing(read_plan_file(job_dir / "plan.json")))
  titles = [element.text for element in svg.iter() if element.tag.endswith("title")]
  assert titles == [
      "prefix 1, positions 0 to 49: 50 tokens shared by 4 rows, saves 150 tokens",
      "prefix 1.1, positions 50 to 69: 20 tokens shared by 2 rows, saves 20 tokens: “<b>Q</b>: Why?…”",
      "prefix 1.2, positions 50 to 59: 10 tokens shared by 2 rows, saves 10 tokens"]


def test_lengths_state_median_and_most(job_dir):
  requests = read_runs(job_dir / "metrics.jsonl")[1].requests
  texts = _texts(plots.lengths(requests))
  assert "Prompt tokens: median 100, most 100" in texts
  assert "Output tokens: median 20, most 30" in texts


def test_colours_are_the_pages_and_ids_are_unique(job_dir):
  svg = (plots.over_time(read_runs(job_dir / "metrics.jsonl"))
         + plots.sharing(read_plan_file(job_dir / "plan.json")))
  assert "var(--blue)" in svg and "var(--muted)" in svg
  assert not re.search(r"#[0-9a-f]{6}\b", svg)
  ids = re.findall(r' id="([^"]*)"', svg)
  assert len(ids) == len(set(ids))


def test_drawing_leaves_matplotlib_settings_alone_and_repeats(job_dir):
  before = dict(matplotlib.rcParams)
  runs = read_runs(job_dir / "metrics.jsonl")
  assert plots.over_time(runs) == plots.over_time(runs)
  assert dict(matplotlib.rcParams) == before


@pytest.mark.parametrize("draw", [plots.over_time, plots.padding, plots.lengths])
def test_nothing_to_draw_is_said(draw):
  with pytest.raises(plots.NothingToDraw, match="no "):
    draw([])
