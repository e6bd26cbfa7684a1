"""Collects what rows draw until their requests are complete; numpy only."""

import collections
import dataclasses
from collections.abc import Sequence

import numpy as np

from batchjax.plan.batch import Batch
from batchjax.plan.prefix_tree import PrefixTree
from batchjax.plan.row import Row
from batchjax.types import Choice, Completion, FinishReason, Request, StepOutputs

_FINISH: dict[int, FinishReason] = {1: "stop", 2: "stop", 3: "length", 4: "error"}


class Results:
  """Choices and prompt log-probabilities of requests that are not complete yet.

  Attributes:
    num_cached: prompt tokens of each request that another one computed.
    num_complete: requests handed out.
  """

  def __init__(self, requests: Sequence[Request], tree: PrefixTree):
    self._requests, self._tree = requests, tree
    self._unfinished = np.array([r.sampling_params.n for r in requests], np.int64)
    self._choices: dict[int, list[Choice]] = collections.defaultdict(list)
    # Scores are kept by node, as (offset, logprobs, top ids, top logprobs), while a request
    # at the node or below it is not complete.
    self._scores: dict[int, list[tuple]] = collections.defaultdict(list)
    self._requests_left = tree.subtree_sum(
        np.bincount(tree.node_of_request, minlength=tree.num_nodes))
    self.num_cached = np.zeros(len(requests), np.int64)
    self.num_complete = 0

  @property
  def finished(self) -> bool:
    """Every request has been handed out."""
    return self.num_complete == len(self._requests)

  def add_scores(self, batch: Batch, outputs: StepOutputs) -> None:
    """Keeps the prompt log-probabilities of a step."""
    if not batch.prompt_scores:
      return
    place = batch.entry_starts
    fields = (outputs.prompt_logprobs, outputs.prompt_top_token_ids, outputs.prompt_top_logprobs)
    for score in batch.prompt_scores:
      first = place[score.entry_node, score.entry_seq] + score.first
      here = slice(first, first + len(score.next_tokens))
      self._scores[score.node].append(
          (score.offset, *(None if field is None else field[here] for field in fields)))

  def finish(self, row: Row) -> Completion | None:
    """Files the choice of a row that has ended; its request's completion if it was the last."""
    params = self._requests[row.request].sampling_params
    count = len(row.tokens) - (row.finish in (1, 4))  # tokens that are no text
    top, num_top = row.top[:count], params.top_logprobs
    has_top = params.logprobs and num_top > 0
    self._choices[row.request].append(Choice(
        index=row.sample, token_ids=np.array(row.tokens[:count], np.int32),
        finish_reason=_FINISH[row.finish],
        logprobs=np.array(row.logprobs[:count], np.float32) if params.logprobs else None,
        top_token_ids=np.array([ids[:num_top] for ids, _ in top], np.int32).reshape(-1, num_top)
        if has_top else None,
        top_logprobs=np.array([values[:num_top] for _, values in top],
                              np.float32).reshape(-1, num_top) if has_top else None))
    self._unfinished[row.request] -= 1
    return None if self._unfinished[row.request] else self._completion(row.request)

  def _completion(self, index: int) -> Completion:
    request = self._requests[index]
    scores = self._prompt_scores(index) if request.sampling_params.prompt_logprobs else (None,) * 3
    for node in self._path(index):
      self._requests_left[node] -= 1
      if not self._requests_left[node]:
        self._scores.pop(node, None)
    self.num_complete += 1
    choices = sorted(self._choices.pop(index), key=lambda choice: choice.index)
    if scores[0] is not None and np.isnan(scores[0][1:]).any():
      choices = [dataclasses.replace(choice, finish_reason="error") for choice in choices]
    return Completion(
        request_id=request.request_id,
        choices=tuple(choices),
        num_prompt_tokens=len(request.prompt_token_ids),
        num_cached_tokens=int(self.num_cached[index]),
        prompt_logprobs=scores[0], prompt_top_token_ids=scores[1], prompt_top_logprobs=scores[2])

  def _prompt_scores(self, index: int) -> tuple[np.ndarray, np.ndarray | None, np.ndarray | None]:
    """Puts together the scores of the nodes on the request's path; the first token has none."""
    prompt_len = len(self._requests[index].prompt_token_ids)
    num_top = self._requests[index].sampling_params.top_logprobs
    logprobs = np.full(prompt_len, np.nan, np.float32)
    top_ids = np.full((prompt_len, num_top), -1, np.int32) if num_top else None
    top_logprobs = np.full((prompt_len, num_top), np.nan, np.float32) if num_top else None
    for node in self._path(index):
      for offset, values, ids, tops in self._scores.get(node, ()):
        start = int(self._tree.start[node]) + offset
        logprobs[start:start + len(values)] = values
        if num_top:
          top_ids[start:start + len(values)] = ids[:, :num_top]
          top_logprobs[start:start + len(values)] = tops[:, :num_top]
    return logprobs, top_ids, top_logprobs

  def _path(self, index: int) -> list[int]:
    node, path = int(self._tree.node_of_request[index]), []
    while node > 0:
      path.append(node)
      node = int(self._tree.parent[node])
    return path
