"""Stop strings: automata over tokens for the device, and the cut of the text on the host."""

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int16, Int32

from batchjax.types import StopTable

MAX_TABLE_BYTES = 512 << 20
_MAX_STATES = np.iinfo(np.int16).max
# Bounds of what is worked on at a time: states (each has a row of 256 bytes), and states times tokens.
_GROUP_STATES, _BLOCK_PAIRS = 1 << 16, 1 << 21


class StopBudget:
  """Counts the states of a job's stop strings, so that the row that needs too many can be told."""

  def __init__(self, vocab_size: int, max_bytes: int = MAX_TABLE_BYTES):
    self._state_bytes, self._max_bytes = 2 * vocab_size, max_bytes
    self._num_states = 0
    self._strings_of: dict[tuple[str, ...], tuple[bytes, ...]] = {}
    self.automata: dict[tuple[bytes, ...], "_Automaton"] = {}

  def add(self, stop: tuple[str, ...]) -> tuple[bytes, ...]:
    """Takes in the stop strings of one more row; those of an earlier row cost nothing.

    Returns:
      The key of their automaton; tuples that stop at the same place share it.

    Raises:
      ValueError: a string is empty, or the table would pass its limit, which stays as it was.
    """
    if stop in self._strings_of:
      return self._strings_of[stop]
    if "" in stop:
      raise ValueError("a stop string is empty: it would end every sample at once; leave it out")
    strings = _needed(sorted({string.encode() for string in stop}))
    if strings not in self.automata:
      automaton = _byte_automaton(strings)
      num_states = self._num_states + len(automaton.depth)
      num_bytes = num_states * self._state_bytes
      if num_bytes > self._max_bytes:
        raise ValueError(f"the stop table of the job would take {num_bytes} bytes with these stop "
                         f"strings, more than {self._max_bytes}: use fewer distinct stop lists "
                         "or shorter strings")
      self._num_states = num_states
      self.automata[strings] = automaton
    self._strings_of[stop] = strings
    return strings


def build_stop_table(stops: Iterable[tuple[str, ...]], token_bytes: Sequence[bytes],
                     max_bytes: int = MAX_TABLE_BYTES) -> StopTable:
  """Automata that see a stop string while it is generated, across token borders too.

  Each distinct set of stop strings becomes an automaton over UTF-8 bytes, run
  through every token from every state. A transition of -1 says that a stop
  string ends within the token, whatever bytes follow it there.

  Args:
    stops: the stop strings of each request; empty tuples are passed over.
    token_bytes: for each of the V ids of the model, the bytes it adds to the
      text; b"" leaves the state alone.
    max_bytes: largest table to build.

  Raises:
    ValueError: a stop string is empty, or the table would exceed `max_bytes`.
  """
  budget = StopBudget(len(token_bytes), max_bytes)
  strings_of = {stop: budget.add(stop) for stop in dict.fromkeys(stops) if stop}
  automata, start_of, num_states = list(budget.automata.values()), {}, 0
  for strings, automaton in budget.automata.items():
    start_of[strings] = num_states
    num_states += len(automaton.depth)
  transitions = np.zeros((num_states, len(token_bytes)), np.int16)
  tokens, start = _Tokens.of(token_bytes), 0
  for group in _groups(automata):
    stop = start + sum(len(automaton.depth) for automaton in group)
    _lift_to_tokens(group, tokens, transitions[start:stop])
    start = stop
  return StopTable(transitions, {stop: start_of[strings] for stop, strings in strings_of.items()})


def cut(text: str, stops: Iterable[str]) -> str:
  """The text before the stop string that is complete first; all of it where there is none.

  Of several that end at the same place the longest counts. So text behind the
  place where a sample stopped, in the same token, changes nothing.
  """
  found = [(start + len(stop), start) for stop in stops if (start := text.find(stop)) >= 0]
  return text[:min(found)[1]] if found else text


class _Automaton(NamedTuple):
  """Aho and Corasick's over bytes (CACM 18(6), 1975); states are numbered breadth first from 0.

  Attributes:
    depth: length of the prefix that the state stands for.
    fallback: the state of its longest proper suffix.
    edges: (state, byte, next), where the state moves otherwise than its fallback; -1 completes.
  """

  depth: Int32[np.ndarray, "states"]
  fallback: Int32[np.ndarray, "states"]
  edges: Int32[np.ndarray, "edges 3"]


class _Trie:
  """The strings' prefixes with their fallbacks, as far as no string is complete on the way."""

  def __init__(self, strings: Sequence[bytes]):
    self.children: list[dict[int, int]] = [{}]
    self.depth, self.fallback, self.ends = [0], [0], [False]
    self.last = [self._insert(string) for string in strings]
    self.live = [0]  # breadth first; more are appended while they are walked
    for node in self.live:
      for byte, child in sorted(self.children[node].items()):
        if node:
          self.fallback[child] = self._move(self.fallback[node], byte)
          self.ends[child] |= self.ends[self.fallback[child]]
        if not self.ends[child]:
          self.live.append(child)

  def _insert(self, string: bytes) -> int:
    node = 0
    for byte in string:
      child = self.children[node].get(byte)
      if child is None:
        child = self.children[node][byte] = len(self.children)
        self.children.append({})
        self.depth.append(self.depth[node] + 1)
        self.fallback.append(0)
        self.ends.append(False)
        if child - len(string) > 4 * _MAX_STATES:
          raise ValueError(f"the stop strings of a row need more than {_MAX_STATES} states: use "
                           "fewer or shorter ones")
      node = child
    self.ends[node] = True
    return node

  def _move(self, node: int, byte: int) -> int:
    while node and byte not in self.children[node]:
      node = self.fallback[node]
    return self.children[node].get(byte, 0)


def _needed(strings: Sequence[bytes]) -> tuple[bytes, ...]:
  """The strings less those that hold another one, which is always complete first."""
  trie = _Trie(strings)
  reached = {child for node in trie.live for child in trie.children[node].values()}
  return tuple(string for string, node in zip(strings, trie.last)
               if node in reached and not trie.ends[trie.fallback[node]])


def _byte_automaton(strings: Sequence[bytes]) -> _Automaton:
  trie = _Trie(strings)
  if len(trie.live) > _MAX_STATES:
    raise ValueError(f"the stop strings of a row need {len(trie.live)} states, more than "
                     f"{_MAX_STATES}: use fewer or shorter ones")
  number = {node: i for i, node in enumerate(trie.live)}
  edges = [(i, byte, number.get(child, -1)) for i, node in enumerate(trie.live)
           for byte, child in trie.children[node].items()]
  return _Automaton(np.array([trie.depth[node] for node in trie.live], np.int32),
                    np.array([number[trie.fallback[node]] for node in trie.live], np.int32),
                    np.array(edges, np.int32))


def _groups(automata: Sequence[_Automaton]) -> Iterator[list[_Automaton]]:
  group, num_states = [], 0
  for automaton in automata:
    if group and num_states + len(automaton.depth) > _GROUP_STATES:
      yield group
      group, num_states = [], 0
    group.append(automaton)
    num_states += len(automaton.depth)
  if group:
    yield group


class _Tokens(NamedTuple):
  """The bytes of all tokens one behind the other, and the tokens that matter to an edge.

  Attributes:
    data, starts, lengths: token t has the bytes data[starts[t]:starts[t] + lengths[t]].
    beginning: for each byte, the tokens that begin with it.
    holding: for each byte, the tokens that hold it anywhere.
  """

  data: np.ndarray
  starts: np.ndarray
  lengths: np.ndarray
  beginning: list[np.ndarray]
  holding: list[np.ndarray]

  @classmethod
  def of(cls, token_bytes: Sequence[bytes]) -> "_Tokens":
    lengths = np.array([len(data) for data in token_bytes], np.int64)
    starts = np.cumsum(lengths) - lengths
    data = np.frombuffer(b"".join(token_bytes), np.uint8)
    filled = np.flatnonzero(lengths)
    owner = np.repeat(np.arange(len(lengths)), lengths)
    byte, held = np.divmod(np.unique(data.astype(np.int64) * len(lengths) + owner),
                           max(len(lengths), 1))
    return cls(data, starts, lengths, [filled[i] for i in _by_value(data[starts[filled]], 256)],
               [held[i] for i in _by_value(byte, 256)])


def _lift_to_tokens(automata: Sequence[_Automaton], tokens: _Tokens,
                    out: Int16[np.ndarray, "states V"]) -> None:
  """Runs automata through every token from every state, into `out`, which holds zeros.

  A state goes where its fallback goes but for the tokens that begin with one of its edges, or are
  empty; the start stays where it is but for those that hold one. So few tokens are walked.
  """
  sizes = np.array([len(automaton.depth) for automaton in automata])
  first = np.cumsum(sizes) - sizes
  base = np.repeat(first, sizes)  # of each state, the start of its automaton
  depth = np.concatenate([automaton.depth for automaton in automata])
  fallback = base + np.concatenate([automaton.fallback for automaton in automata])
  edges = np.concatenate([automaton.edges for automaton in automata])
  offset = np.repeat(first, [len(automaton.edges) for automaton in automata])
  complete = len(depth)  # one more state, which nothing leaves
  empty = np.flatnonzero(tokens.lengths == 0)
  source, byte = edges[:, 0] + offset, edges[:, 1]
  target = np.where(edges[:, 2] < 0, complete, edges[:, 2] + offset)

  next_state = np.empty((complete + 1, 256), np.int32)
  next_state[complete] = complete
  num_levels = depth.max() + 1
  states_of, edges_of = _by_value(depth, num_levels), _by_value(depth[source], num_levels)
  for states, chosen in zip(states_of, edges_of):
    next_state[states] = next_state[fallback[states]] if depth[states[0]] else states[:, None]
    next_state[source[chosen], byte[chosen]] = target[chosen]

  for states, chosen in zip(states_of, edges_of):
    is_start = not depth[states[0]]
    if not is_start:
      for part in range(0, len(states), 1 + _BLOCK_PAIRS // out.shape[1]):
        rows = states[part:part + 1 + _BLOCK_PAIRS // out.shape[1]]
        out[rows] = out[fallback[rows]]
        out[np.ix_(rows, empty)] = (rows - base[rows])[:, None]
    concerned = tokens.holding if is_start else tokens.beginning
    for block in _blocks(chosen, np.array([len(ids) for ids in concerned])[byte[chosen]]):
      ids = [concerned[b] for b in byte[block]]
      state = np.repeat(source[block], [len(i) for i in ids])
      token = np.concatenate(ids)
      reached = _walk(state, token, tokens, next_state.ravel(), complete)
      out[state, token] = np.where(reached == complete, -1, reached - base[state])


def _by_value(values: np.ndarray, count: int) -> list[np.ndarray]:
  """The indices of each value from 0 to count-1."""
  order = np.argsort(values, kind="stable")
  return np.split(order, np.searchsorted(values[order], np.arange(1, count)))


def _blocks(items: np.ndarray, sizes: np.ndarray) -> Iterator[np.ndarray]:
  """The items in parts whose sizes add up to about `_BLOCK_PAIRS`."""
  part = np.cumsum(sizes) // _BLOCK_PAIRS
  yield from (piece for piece in np.split(items, np.flatnonzero(np.diff(part)) + 1) if len(piece))


def _walk(state: np.ndarray, token: np.ndarray, tokens: _Tokens, next_state: np.ndarray,
          complete: int) -> np.ndarray:
  """The state behind each token from each state."""
  reached, position = state.copy(), 0
  left = np.arange(len(state))
  while left.size:
    data = tokens.data[tokens.starts[token[left]] + position]
    reached[left] = next_state[reached[left] * 256 + data]
    position += 1
    left = left[(tokens.lengths[token[left]] > position) & (reached[left] != complete)]
  return reached
