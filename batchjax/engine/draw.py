"""Draws from logits: weights summed in a tree, thresholds, and the nucleus by rejection.

Sums are written out in a fixed order and random bits come from the row's own key, so that a row's
draw is the same, bit for bit, in whatever step it is made, and on however many devices: each holds
whole segments of the vocabulary, and what they exchange is sums of segments, thresholds and candidates.
"""

import functools
import operator
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from batchjax.config import VOCAB_SEGMENTS
from batchjax.engine.sampling_inputs import SamplingFeatures
from batchjax.sharding import Split
from batchjax.types import SamplingInputs

# Sums over the vocabulary are trees of this fan-out; the root's children are its segments.
_FAN_OUT = 16
# Stands for NaN and infinity, which no later step has to mind; no model gives it.
LIMIT = float(jnp.finfo(jnp.float32).max)
# exp(-60) and sums of such weights are normal numbers, which no device flushes to zero.
_MIN_EXPONENT = -60.0
# The reciprocals of smaller numbers overflow; rows this cold are greedy but for exact ties.
_MIN_TEMPERATURE = 1e-30
# Of the rows, one in so many is drawn again at a time: many at first, few when few are left.
_SHARES = (8, 64)
# Up to here the k-th largest logit comes from lax.top_k, above from a search over its bits.
_MAX_SELECT = 1024


class Weights(NamedTuple):
  """What each token of a row weighs: exp((logit - highest) / temperature), never held as a whole.

  Every pass over the vocabulary makes the weights anew from the logits, which is less to read
  and write than to keep them. Tokens are told apart by their logits, which are the same in every
  pass.
  """

  logits: Array
  highest: Array
  coldness: Array  # 1 / temperature
  split: Split

  def of(self, logits: Array, lowest: Array) -> Array:
    """Weights of some of each row's logits f32[R, n]; 0 below `lowest` f32[R] and where it is NaN."""
    exponents = (logits - self.highest[:, None]) * self.coldness[:, None]
    return jnp.where(logits >= lowest[:, None], _weight(exponents), 0.0)

  def sums(self, *lowest: Array) -> list[Array]:
    """f32[R, C] for each `lowest`: the weight of each column of `columns` without tokens below it."""
    parts = columns(self.logits, self.split)
    sums = [functools.reduce(operator.add, (self.of(x, least) for x in parts)) for least in lowest]
    # Else XLA fuses the next level of the tree into this pass, which then takes four times as long.
    return lax.optimization_barrier(sums)


def highest_and_sums(logits: Array, coldness: Array, split: Split = Split()) -> tuple[Array, Array]:
  """The largest `finite` logit of each row f32[R], and `Weights.sums` of all tokens, in one pass.

  Columns are summed relative to their own maxima, and scaled when the row's is known.
  """
  parts = columns(logits, split)
  maxima = functools.reduce(jnp.maximum, map(finite, parts))
  sums = functools.reduce(operator.add, (_weight((x - maxima) * coldness[:, None]) for x in parts))
  maxima, sums = lax.optimization_barrier((maxima, sums))
  highest = split.max(maxima.max(axis=1))
  sums *= _weight((maxima - highest[:, None]) * coldness[:, None])
  # Products that are added in the same program may be rounded once or twice.
  return highest, lax.optimization_barrier(sums)


def _weight(exponents: Array) -> Array:
  return jnp.where(exponents >= _MIN_EXPONENT, jnp.exp(exponents), 0.0)


def finite(logits: Array) -> Array:
  """Finite logits, of which the largest says whether all were so."""
  return jnp.nan_to_num(logits, nan=LIMIT, posinf=LIMIT, neginf=-LIMIT)


def draw(logits: Array, inputs: SamplingInputs, positions: Array, features: SamplingFeatures,
         split: Split = Split()) -> tuple[Array, Array]:
  """Steps 5 to 7 of `sample`: a token of each row, and its largest `finite` logit.

  The nucleus is never computed. A token is drawn from all that are left, and
  it lies in the nucleus if the tokens more likely than it have less than
  top_p of the mass. If not, neither it nor any less likely one does: they are
  struck out and the draw is repeated. That is rejection sampling, so what it
  accepts is distributed as the nucleus exactly. One pass over the vocabulary
  tests two tokens and sums the mass for their successor; what more it takes is
  done for the rows in doubt alone, of which there are few.
  """
  temperature = jnp.maximum(inputs.temperature, _MIN_TEMPERATURE)
  coldness = 1 / temperature
  lowest = jnp.full(temperature.shape, -jnp.inf)
  if features.min_p or features.max_top_k:
    maxima = functools.reduce(jnp.maximum, map(finite, columns(logits, split)))
    highest = split.max(maxima.max(axis=1))
    if features.min_p:  # two roundings, in whatever program
      lowest = highest + lax.optimization_barrier(temperature * jnp.log(inputs.min_p))
    if features.max_top_k:
      kth = kth_largest(logits, maxima, inputs.top_k, features.max_top_k, split)
      lowest = jnp.maximum(lowest, jnp.where(inputs.top_k > 0, kth, -jnp.inf))
    weights = Weights(logits, highest, coldness, split)
    sums, = weights.sums(lowest)
  else:
    highest, sums = highest_and_sums(logits, coldness, split)
    weights = Weights(logits, highest, coldness, split)
  row_keys = jax.vmap(_row_key)(inputs.seed, inputs.sample_index, positions)
  tree, mass = sum_tree(sums, split)
  propose = lambda attempt: _descend(weights, tree, lowest, row_keys,
                                     jnp.full(highest.shape, attempt, jnp.int32))
  first = propose(0)
  if not features.top_p:
    return first, highest
  nucleus_mass = inputs.top_p * mass
  second = propose(1)
  above_first, above_second = _above(weights, first), _above(weights, second)
  above = jnp.maximum(above_first, above_second)
  sums, sums_of_both = weights.sums(above, jnp.minimum(above_first, above_second))
  (tree_above, mass_above), (_, mass_above_both) = sum_tree(sums, split), sum_tree(sums_of_both, split)
  inside = lambda its: _is_inside(jnp.where(its == above, mass_above, mass_above_both), nucleus_mass)
  is_first = (inputs.top_p >= 1) | inside(above_first)
  accepted = is_first | inside(above_second)
  attempts = jnp.full(highest.shape, 2, jnp.int32)
  again = _descend(weights, tree_above, above, row_keys, attempts)
  tokens = jnp.where(is_first, first, jnp.where(accepted, second, again))

  def for_some(num_some, carry):
    """Tests the proposals of some of the rows in doubt, and draws again where one is refused."""
    attempts, tokens, accepted = carry
    rows, = jnp.nonzero(~accepted, size=num_some, fill_value=len(highest))
    of = functools.partial(jnp.take, indices=rows, axis=0, mode="clip")
    some, its_tokens, its_mass, its_keys, its_attempts = jax.tree.map(
        of, (weights, tokens, nucleus_mass, row_keys, attempts + 1))
    above = _above(some, its_tokens)
    tree, mass_above = sum_tree(*some.sums(above), split)
    is_inside = _is_inside(mass_above, its_mass)
    its_tokens = jnp.where(is_inside, its_tokens, _descend(some, tree, above, its_keys, its_attempts))
    put = lambda values, new: values.at[rows].set(new, mode="drop")
    return put(attempts, its_attempts), put(tokens, its_tokens), put(accepted, is_inside)

  carry = attempts, tokens, accepted
  for share, following in zip(_SHARES, (*_SHARES[1:], None)):
    count = lambda share: 0 if share is None else -(-len(highest) // share)
    carry = lax.while_loop(lambda carry: (~carry[2]).sum() > count(following),
                           functools.partial(for_some, count(share)), carry)
  return carry[1], highest


def _above(weights: Weights, tokens: Array) -> Array:
  """The least logit above that of each row's token."""
  return _next_up(logits_of(weights.logits, tokens, weights.split))


def _is_inside(mass_above: Array, nucleus_mass: Array) -> Array:
  """Whether a token lies in the nucleus, by the mass of the tokens more likely than it."""
  return (mass_above < nucleus_mass) | (mass_above == 0)


def _row_key(seed: Array, sample_index: Array, position: Array) -> Array:
  key = jax.random.key(seed, impl="threefry2x32")
  return jax.random.fold_in(jax.random.fold_in(key, sample_index), position)


def _next_up(x: Array) -> Array:
  """The next larger float32 of a finite x."""
  bits = lax.bitcast_convert_type(x + 0.0, jnp.int32)  # of the two zeros, the positive one
  return lax.bitcast_convert_type(jnp.where(x >= 0, bits + 1, bits - 1), jnp.float32)


def logits_of(logits: Array, tokens: Array, split: Split = Split()) -> Array:
  """f32[R], each row's logit of its token (>= 0)."""
  places, last = split.places(tokens), logits.shape[1] - 1
  found = jnp.take_along_axis(logits, jnp.minimum(places, last)[:, None], axis=1)[:, 0]
  return split.of_owner(found, places <= last)


def kth_largest(logits: Array, maxima: Array, k: Array, max_k: int,
                split: Split = Split()) -> Array:
  """The k-th largest of each row of f32[R, V]; `maxima` are those of its `columns`."""
  num_places = logits.shape[1]
  k = jnp.clip(k, 1, split.vocab_size or num_places)[:, None]
  if max_k <= _MAX_SELECT:
    if num_places <= 2 * _FAN_OUT * max_k:
      best = lax.top_k(logits, min(max_k, num_places))[0]
    else:  # they lie in the columns with the largest maxima
      _, nodes = largest(maxima, max_k)
      places = nodes[:, None] + maxima.shape[1] * jnp.arange(_FAN_OUT, dtype=nodes.dtype)[:, None]
      best = _best_of(logits, places, max_k)[0]
    if split.num_devices > 1:
      candidates = split.gather(best)
      best = lax.top_k(candidates, min(max_k, candidates.shape[1]))[0]
    return jnp.take_along_axis(best, k - 1, axis=1)[:, 0]
  # As integers in the order of the floats.
  bits = lax.bitcast_convert_type(logits, jnp.int32)
  keys = bits ^ ((bits >> 31) & jnp.int32(2**31 - 1))

  def decide_bit(i, kth):
    candidate = kth + jnp.left_shift(jnp.int32(1), 31 - i)  # from the least integer on, wrapping once
    # Counts below 2**24 are exact in float32, whose sums CPUs vectorise better.
    num_above = split.sum((keys >= candidate).astype(jnp.float32).sum(axis=1))
    return jnp.where(num_above[:, None] >= k, candidate, kth)

  kth = lax.fori_loop(0, 32, decide_bit, jnp.full((len(k), 1), -2**31, jnp.int32))
  kth ^= (kth >> 31) & jnp.int32(2**31 - 1)
  return lax.bitcast_convert_type(kth[:, 0], jnp.float32)


def largest(x: Array, k: int) -> tuple[Array, Array]:
  """The k largest of each row of f32[R, N], in falling order; and their places, the lowest among equals.

  They lie in the k blocks with the largest maxima, which are found the same way: all that is
  sorted is short.
  """
  size = x.shape[1]
  if size <= 2 * _FAN_OUT * k:
    return lax.top_k(x, k)
  num_blocks = -(-size // _FAN_OUT)
  blocks = jnp.pad(x, ((0, 0), (0, num_blocks * _FAN_OUT - size)), constant_values=-jnp.inf)
  _, nodes = largest(blocks.reshape(len(x), num_blocks, _FAN_OUT).max(axis=2), k)
  # In the order of places: the sort is stable.
  places = _FAN_OUT * jnp.sort(nodes, axis=1)[:, :, None] + jnp.arange(_FAN_OUT, dtype=nodes.dtype)
  return _best_of(x, places, k)


def _best_of(x: Array, places: Array, k: int) -> tuple[Array, Array]:
  """The k largest of those of each row's values f32[R, N] that are at `places` i32[R, ...]."""
  places = places.reshape(len(x), -1)
  found = jnp.take_along_axis(x, jnp.minimum(places, x.shape[1] - 1), axis=1)
  best, at = lax.top_k(jnp.where(places < x.shape[1], found, -jnp.inf), k)
  return best, jnp.take_along_axis(places, at, axis=1)


def columns(x: Array, split: Split = Split(), fill: float = -jnp.inf) -> list[Array]:
  """f32[R, N] as up to `_FAN_OUT` arrays f32[R, C], `fill` at the end; element n lies in column n % C.

  C is a multiple of the segments of the vocabulary, so a column is of one of them.
  """
  size, num_segments = x.shape[1], split.num_segments
  num_columns = num_segments * -(-size // (num_segments * _FAN_OUT))
  columns = [x[:, i:i + num_columns] for i in range(0, size, num_columns)]
  short = num_columns - columns[-1].shape[1]
  return [*columns[:-1], jnp.pad(columns[-1], ((0, 0), (0, short)), constant_values=fill)]


class SumTree(NamedTuple):
  """Sums over the vocabulary; all but the root's children are of this device's part of it.

  Attributes:
    levels: f32[R, n], from those of columns to those of segments; entry c of a level sums column c
      of the level below.
    segments: f32[R, VOCAB_SEGMENTS or more], the root's children, of all devices.
  """

  levels: list[Array]
  segments: Array


def sum_tree(sums: Array, split: Split = Split()) -> tuple[SumTree, Array]:
  """A tree over the sums f32[R, C] of columns, and their total f32[R].

  Written out term by term: an order that no compiler changes.
  """
  levels = [sums]
  while levels[-1].shape[1] > split.num_segments:
    levels.append(functools.reduce(operator.add, columns(levels[-1], split, 0.0)))
  segments = split.gather(levels[-1])
  total = functools.reduce(operator.add, (segments[:, i] for i in range(VOCAB_SEGMENTS)))
  return SumTree(levels, segments), total


def _descend(weights: Weights, tree: SumTree, lowest: Array, row_keys: Array,
             attempts: Array) -> Array:
  """Draws a token in proportion to its weight: from the root, a child in proportion to its sum.

  The child is drawn by the Gumbel maximum, which never takes one of weight 0.
  Its random numbers are few: one for each child of the nodes on the way down.
  All devices draw the segment; the one that holds it goes on to the token.
  """
  split, below = weights.split, [*reversed(tree.levels[:-1]), weights.logits]
  num_drawn = VOCAB_SEGMENTS + _FAN_OUT * len(below)
  gumbel = jax.vmap(lambda key, attempt: jax.random.gumbel(
      jax.random.fold_in(key, attempt), (num_drawn,)))(row_keys, attempts)
  segments = tree.segments[:, :VOCAB_SEGMENTS]
  segment = jnp.argmax(jnp.log(segments) + gumbel[:, :VOCAB_SEGMENTS], axis=1).astype(jnp.int32)
  node, num_nodes = split.own_segments(segment), split.num_segments
  is_here, node = node < num_nodes, jnp.minimum(node, num_nodes - 1)[:, None]
  for i, level in enumerate(below):
    size = level.shape[1]
    children = node + num_nodes * jnp.arange(-(-size // num_nodes), dtype=jnp.int32)
    values = jnp.take_along_axis(level, jnp.minimum(children, size - 1), axis=1)
    if level is weights.logits:
      values = weights.of(values, lowest)
    values = jnp.where(children < size, values, 0.0)
    noise = gumbel[:, VOCAB_SEGMENTS + _FAN_OUT * i:][:, :children.shape[1]]
    child = jnp.argmax(jnp.log(values) + noise, axis=1)
    node = jnp.take_along_axis(children, child[:, None], axis=1)
    num_nodes = size
  return split.of_owner(split.token_ids(node[:, 0]), is_here)
