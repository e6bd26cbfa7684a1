"""The plan file as the report reads it."""

import json

from hypothesis import given
from hypothesis import strategies as st
import pytest

from batchjax.report.sharing import PlanFileError, read_plan_file, row_starts, SharedNode


def test_a_plan_file_is_read(job_dir, plan_values):
  plan = read_plan_file(job_dir / "plan.json")
  assert plan.nodes == (SharedNode(-1, 0, 50, 4), SharedNode(0, 50, 20, 2, "<b>Q</b>: Why?"),
                        SharedNode(0, 50, 10, 2))
  assert [node.saved_tokens for node in plan.nodes] == [150, 20, 10]
  assert (plan.prompt_tokens_asked, plan.prompt_tokens_computed, plan.optimum) == (400, 230, 220)
  assert list(plan.buckets) == plan_values["buckets"]
  assert plan.settings == {"predicted_secs": 9.5}


def test_children_lie_side_by_side_inside_their_parents():
  nodes = (SharedNode(-1, 0, 5, 10), SharedNode(0, 5, 5, 4), SharedNode(1, 10, 5, 2),
           SharedNode(0, 5, 5, 6), SharedNode(-1, 0, 5, 3), SharedNode(4, 5, 5, 2))
  assert row_starts(nodes) == (0, 0, 0, 4, 10, 10)


@pytest.mark.parametrize("change", [
    {"parent": 1}, {"parent": -2}, {"length": 0}, {"num_rows": 0}, {"start": -1}])
def test_an_impossible_node_is_named(tmp_path, plan_values, change):
  plan_values["nodes"][1].update(change)
  path = tmp_path / "plan.json"
  path.write_text(json.dumps(plan_values))
  with pytest.raises(PlanFileError, match=r"plan\.json: nodes\[1\]"):
    read_plan_file(path)


@pytest.mark.parametrize("text", ["", "[]", '{"nodes": []}', '{"nodes": [{"start": 0}]}'])
def test_another_form_is_an_error(tmp_path, text):
  path = tmp_path / "plan.json"
  path.write_text(text)
  with pytest.raises(PlanFileError, match="is not a plan file"):
    read_plan_file(path)


@st.composite
def _trees(draw, first_index: int = 0, parent: int = -1, start: int = 0, max_rows: int = 12):
  """Nodes, depth first, of siblings that together have at most `max_rows` rows."""
  nodes = []
  while max_rows and draw(st.booleans()):
    num_rows, length = draw(st.integers(1, max_rows)), draw(st.integers(1, 5))
    max_rows -= num_rows
    index = first_index + len(nodes)
    nodes.append(SharedNode(parent, start, length, num_rows))
    if start < 15:
      nodes += draw(_trees(index + 1, index, start + length, num_rows))
  return nodes


@given(_trees())
def test_no_two_boxes_of_the_map_overlap_and_children_stay_below_their_parent(nodes):
  starts = row_starts(tuple(nodes))
  held = set()
  for node, first_row in zip(nodes, starts):
    rows = range(first_row, first_row + node.num_rows)
    cells = {(row, node.start + i) for row in rows for i in range(node.length)}
    assert not cells & held
    held |= cells
    if node.parent >= 0:
      above = range(starts[node.parent], starts[node.parent] + nodes[node.parent].num_rows)
      assert set(rows) <= set(above)
