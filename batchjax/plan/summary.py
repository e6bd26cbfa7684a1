"""A plan as JSON: what `batchjax plan` prints and the report draws."""

from collections.abc import Callable
from typing import Any

import numpy as np

from batchjax.plan.planner import Plan

_MAX_NODES = 60
# Of a node's text, enough to know it by.
_MAX_TEXT_TOKENS, _MAX_TEXT_CHARS = 24, 80


def plan_summary(plan: Plan, text_of: Callable[[int, int, int], str] | None = None
                 ) -> dict[str, Any]:
  """The `plan.json` of a job directory; `report.sharing` says what its fields mean.

  Args:
    plan: of a window.
    text_of: `text_of(request_index, start, length)` is the text of tokens of a prompt of the window;
      None leaves texts out.
  """
  tree, totals, prediction = plan.tree, plan.totals, plan.prediction
  saved = np.where(tree.num_rows > 1, tree.length.astype(np.int64) * (tree.num_rows - 1), 0)
  saved[0] = 0
  top = np.sort(np.argsort(-saved, kind="stable")[:_MAX_NODES])
  top = top[saved[top] > 0]
  place = {int(node): i for i, node in enumerate(top)}
  nodes = []
  for node in top:
    parent = int(tree.parent[node])
    while parent > 0 and parent not in place:
      parent = int(tree.parent[parent])
    start, length = int(tree.start[node]), int(tree.length[node])
    nodes.append({"parent": place.get(parent, -1), "start": start, "length": length,
                  "num_rows": int(tree.num_rows[node])})
    if text_of is not None:
      text = text_of(int(tree.source[node]), start, min(length, _MAX_TEXT_TOKENS))
      nodes[-1]["text"] = " ".join(text.split())[:_MAX_TEXT_CHARS]
  summary = {
      "nodes": nodes,
      "totals": {"prompt_tokens_asked": totals.prompt_tokens_asked,
                 "prompt_tokens_computed": totals.prompt_tokens_planned,
                 "optimum": totals.prompt_tokens_optimal},
      "buckets": [{"kind": b.kind, "tokens": b.num_tokens, "rows": b.num_rows,
                   "segments": b.num_segments} for b in plan.buckets],
      "num_pages": plan.num_pages,
      "shared_nodes": int((tree.num_rows[1:] > 1).sum()),
      "decode_tokens_at_most": totals.decode_tokens,
  }
  if prediction is not None:
    summary |= {"predicted_secs": round(prediction.secs, 3),
                "predicted_ladder_secs": round(prediction.ladder_secs, 3),
                "predicted_padding_waste": round(prediction.padding_waste, 4),
                "predicted_mixed_steps": prediction.num_mixed,
                "predicted_decode_loops": prediction.num_decode,
                "predicted_peak_pages": prediction.peak_pages}
  return summary
