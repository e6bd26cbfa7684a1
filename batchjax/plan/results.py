"""Collects what rows draw until their requests are complete; numpy only."""

import collections
import dataclasses
from collections.abc import Sequence

from jaxtyping import Int
import numpy as np

from batchjax.plan.batch import Batch
from batchjax.plan.history import History
from batchjax.plan.prefix_tree import PrefixTree
from batchjax.plan.rows import Rows
from batchjax.types import Choice, Completion, FinishReason, Request, StepOutputs

_FINISH: dict[int, FinishReason] = {1: "stop", 2: "stop", 3: "length", 4: "error"}


class Results:
  """Choices and prompt log-probabilities of requests that are not complete yet.

  Attributes:
    history: what rows that have not ended have drawn.
    num_complete: requests handed out.
  """

  def __init__(self, requests: Sequence[Request], tree: PrefixTree, rows: Rows):
    self._requests, self._tree, self._rows = requests, tree, rows
    self.history = History(len(rows))
    self._finish = np.zeros(len(rows), np.int8)  # as in `StepOutputs`; 0 while the row goes on
    self._unfinished = np.array([r.sampling_params.n for r in requests], np.int64)
    self._choices: dict[int, list[Choice]] = collections.defaultdict(list)
    # Scores are kept by node, as (offset, logprobs, top ids, top logprobs), while a request
    # at the node or below it is not complete.
    self._scores: dict[int, list[tuple]] = collections.defaultdict(list)
    self._requests_left = tree.subtree_sum(
        np.bincount(tree.node_of_request, minlength=tree.num_nodes))
    self._num_cached = _num_cached(tree, rows)
    self.num_complete = 0

  @property
  def finished(self) -> bool:
    """Every request has been handed out."""
    return self.num_complete == len(self._requests)

  def add(self, batch: Batch, outputs: StepOutputs) -> Int[np.ndarray, "n"]:
    """Keeps the results of a step; returns the rows that end with it, in order."""
    self._add_scores(batch, outputs)
    # What a row is found to have ended with is known; later steps that were in flight drew nothing.
    is_going = self._finish[batch.samples.seq] == 0
    here = slice(len(is_going)) if is_going.all() else np.flatnonzero(is_going)
    seqs, columns = batch.samples.seq[here], {}
    for name in ("tokens", "logprobs", "top_token_ids", "top_logprobs"):
      if (values := getattr(outputs, name)) is not None:
        columns[name] = np.asarray(values)[:, here]
    counts = (columns["tokens"] >= 0).sum(axis=0)
    self.history.append(seqs, counts, **columns)
    finish = np.asarray(outputs.finish)[:, here][counts - 1, np.arange(len(seqs))]
    self._finish[seqs] = np.where(self._rows.max_tokens[seqs] > 0, finish, 3)
    return seqs[self._finish[seqs] > 0]

  def _add_scores(self, batch: Batch, outputs: StepOutputs) -> None:
    if not batch.prompt_scores:
      return
    offsets = batch.entries.offsets
    fields = (outputs.prompt_logprobs, outputs.prompt_top_token_ids, outputs.prompt_top_logprobs)
    for score in batch.prompt_scores:
      first = offsets[score.entry] + score.skipped
      here = slice(first, first + len(score.next_tokens))
      self._scores[score.node].append(
          (score.offset, *(None if field is None else field[here] for field in fields)))

  def complete(self, seqs: Int[np.ndarray, "n"]) -> list[Completion]:
    """Files the choices of rows that have ended; the requests that are complete with them."""
    completions = []
    for seq in seqs.tolist():
      index = int(self._rows.request[seq])
      self._choices[index].append(self._choice(seq))
      self._unfinished[index] -= 1
      if not self._unfinished[index]:
        completions.append(self._completion(index))
    return completions

  def _choice(self, seq: int) -> Choice:
    params = self._requests[self._rows.request[seq]].sampling_params
    finish = int(self._finish[seq])
    drawn = self.history.pop(seq, int(self.history.num_tokens[seq]))
    stop_token_id = int(drawn["tokens"][-1]) if finish == 1 else -1
    if finish in (1, 4):  # the last token of a row that stopped or failed is no text
      drawn = {name: values[:-1] for name, values in drawn.items()}
    num_top = params.top_logprobs
    has_top = params.logprobs and num_top > 0
    return Choice(
        index=int(self._rows.sample[seq]), token_ids=drawn["tokens"],
        finish_reason=_FINISH[finish], logprobs=drawn["logprobs"] if params.logprobs else None,
        top_token_ids=drawn["top_token_ids"][:, :num_top] if has_top else None,
        top_logprobs=drawn["top_logprobs"][:, :num_top] if has_top else None,
        stop_token_id=stop_token_id)

  def _completion(self, index: int) -> Completion:
    request = self._requests[index]
    scores = self._prompt_scores(index) if request.sampling_params.prompt_logprobs else (None,) * 3
    for node in self._path(index):
      self._requests_left[node] -= 1
      if not self._requests_left[node]:
        self._scores.pop(node, None)
    self.num_complete += 1
    choices = sorted(self._choices.pop(index), key=lambda choice: choice.index)
    start = max(1, request.sampling_params.prompt_logprobs_start)
    if scores[0] is not None and np.isnan(scores[0][start:]).any():
      choices = [dataclasses.replace(choice, finish_reason="error") for choice in choices]
    return Completion(
        request_id=request.request_id,
        choices=tuple(choices),
        num_prompt_tokens=len(request.prompt_token_ids),
        num_cached_tokens=int(self._num_cached[index]),
        prompt_logprobs=scores[0], prompt_top_token_ids=scores[1], prompt_top_logprobs=scores[2])

  def _prompt_scores(self, index: int) -> tuple[np.ndarray, np.ndarray | None, np.ndarray | None]:
    """Puts together the scores of the nodes on the request's path; the first token has none."""
    prompt_len = len(self._requests[index].prompt_token_ids)
    params = self._requests[index].sampling_params
    num_top, not_asked = params.top_logprobs, slice(params.prompt_logprobs_start)
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
    logprobs[not_asked] = np.nan  # others that share the node may have asked
    if num_top:
      top_ids[not_asked], top_logprobs[not_asked] = -1, np.nan
    return logprobs, top_ids, top_logprobs

  def _path(self, index: int) -> list[int]:
    node, path = int(self._tree.node_of_request[index]), []
    while node > 0:
      path.append(node)
      node = int(self._tree.parent[node])
    return path


def _num_cached(tree: PrefixTree, rows: Rows) -> Int[np.ndarray, "requests"]:
  """Prompt tokens of each request that a row before its first one computes."""
  first = np.flatnonzero(rows.sample == 0)
  before = np.append(0, rows.node[:-1])[first]
  node = rows.node[first]
  while (is_new := node > before).any():  # a row before is at or below no node behind its own
    node = np.where(is_new, tree.parent[node], node)
  num_cached = np.empty(len(first), np.int64)
  num_cached[rows.request[first]] = tree.end[node]
  return num_cached
