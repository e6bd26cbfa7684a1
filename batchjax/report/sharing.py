"""What a job planned to share: `plan.json` of the job directory.

    {"nodes": [{"parent": -1, "start": 0, "length": 812, "num_rows": 1319,
                "text": "Q: There are 15 trees in the grove."}, ...],
     "totals": {"prompt_tokens_asked": 1234567, "prompt_tokens_computed": 163456,
                "optimum": 161002},
     "buckets": [{"kind": "mixed", "tokens": 1024, "rows": 64}, ...],
     "predicted_secs": 12.5}

A node is a range of prompt tokens that several rows share and that is computed
once. `parent` is the index in `nodes` of the nearest listed node above it, or -1;
a parent comes before its children. `start` is the position of its first token,
`length` its tokens, `num_rows` the rows below it, `text`, if there, how it begins. The list holds the nodes that
save most tokens, about 60, depth first. `optimum` is what computing every shared
token once would compute, without a bound on levels or memory. `buckets` are
table rows with any keys. Further numbers or strings beside them are shown as they are.
"""

from collections.abc import Mapping
import dataclasses
import json
import os
from typing import Any

from batchjax.config import from_config_dict
from batchjax.io import files

PLAN_FILE = "plan.json"


class PlanFileError(ValueError):
  """`plan.json` is not of the form above; the message says where."""


@dataclasses.dataclass(frozen=True)
class SharedNode:
  """A prompt range computed once for several rows; `parent` indexes the list, or is -1; `text` may be ""."""

  parent: int
  start: int
  length: int
  num_rows: int
  text: str = ""

  @property
  def saved_tokens(self) -> int:
    """Prompt tokens that sharing it saves."""
    return self.length * (self.num_rows - 1)


@dataclasses.dataclass(frozen=True)
class PlanFile:
  """The parts of `plan.json`.

  Attributes:
    nodes: shared nodes, parents before children.
    prompt_tokens_asked: over all requests.
    prompt_tokens_computed: as planned.
    optimum: the least possible.
    buckets: one mapping per compiled shape.
    settings: all other numbers and strings.
  """

  nodes: tuple[SharedNode, ...]
  prompt_tokens_asked: int
  prompt_tokens_computed: int
  optimum: int
  buckets: tuple[Mapping[str, Any], ...]
  settings: Mapping[str, float | str]


def read_plan_file(path: str | os.PathLike) -> PlanFile:
  """Reads and checks `plan.json`.

  Raises:
    FileNotFoundError: there is no such file.
    PlanFileError: it is not of the form above.
  """
  with open(path, encoding="utf-8", opener=files.open_regular) as file:
    try:
      values = json.loads(file.read())
    except (ValueError, RecursionError) as error:
      raise PlanFileError(f"{os.path.basename(path)} is not a plan file: {error!r}") from error
  try:
    nodes = tuple(from_config_dict(SharedNode, node, "node") for node in values["nodes"])
    totals = {name: values["totals"][name]
              for name in ("prompt_tokens_asked", "prompt_tokens_computed", "optimum")}
    if not all(type(value) is int for value in totals.values()):
      raise ValueError(f"totals are {totals}")
    plan = PlanFile(
        nodes, *totals.values(),
        tuple(dict(bucket) for bucket in values.get("buckets", ())),
        {k: v for k, v in values.items() if isinstance(v, (int, float, str))})
  except (ValueError, KeyError, TypeError, AttributeError) as error:
    raise PlanFileError(f"{os.path.basename(path)} is not a plan file: {error!r}") from error
  for index, node in enumerate(nodes):
    if not -1 <= node.parent < index or node.length < 1 or node.num_rows < 1 or node.start < 0:
      raise PlanFileError(f"{os.path.basename(path)}: nodes[{index}] = {node} must have a parent "
                          "before it (or -1), start >= 0, length >= 1 and num_rows >= 1")
  return plan


def node_names(nodes: tuple[SharedNode, ...]) -> tuple[str, ...]:
  """"1" and "2" for the topmost nodes in the order of the list, "1.1" for the first below "1"."""
  names: list[str] = []
  num_below = [0] * (len(nodes) + 1)  # of the root, then of each node
  for node in nodes:
    num_below[node.parent + 1] += 1
    above = f"{names[node.parent]}." if node.parent >= 0 else ""
    names.append(f"{above}{num_below[node.parent + 1]}")
  return tuple(names)


def row_starts(nodes: tuple[SharedNode, ...]) -> tuple[int, ...]:
  """The first row below each node, when rows are numbered in the order of the list.

  Siblings lie side by side inside their parent's rows; roots one after the other.
  """
  starts: list[int] = []
  # next_free[i + 1] is the first row of node i that no listed child holds yet; [0] is the root's.
  next_free = [0]
  for node in nodes:
    start = next_free[node.parent + 1]
    next_free[node.parent + 1] += node.num_rows
    starts.append(start)
    next_free.append(start)
  return tuple(starts)
