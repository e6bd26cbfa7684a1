"""Draws from logits: weights summed in a tree, thresholds, and the nucleus by rejection.

Sums are written out in a fixed order and random bits come from the row's own key, so that a row's
draw is the same, bit for bit, in whatever step it is made.
"""

import functools
import operator
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from batchjax.engine.sampling_inputs import SamplingFeatures
from batchjax.types import SamplingInputs

# Sums over the vocabulary are trees of this fan-out.
_FAN_OUT = 16
# exp(-60) and sums of such weights are normal numbers, which no device flushes to zero.
_MIN_EXPONENT = -60.0
# The reciprocals of smaller numbers overflow; rows this cold are greedy but for exact ties.
_MIN_TEMPERATURE = 1e-30
# One in so many rows is drawn again at a time.
_SOME_ROWS = 8
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

  def of(self, logits: Array, lowest: Array) -> Array:
    """Weights of some of each row's logits f32[R, n]; 0 below `lowest` f32[R] and where it is NaN."""
    exponents = (logits - self.highest[:, None]) * self.coldness[:, None]
    kept = (logits >= lowest[:, None]) & (exponents >= _MIN_EXPONENT)
    return jnp.where(kept, jnp.exp(exponents), 0.0)

  def sums(self, lowest: Array) -> Array:
    """f32[R, C], the weight of each column of `columns` without tokens below `lowest`."""
    sums = functools.reduce(operator.add, (self.of(x, lowest) for x in columns(self.logits)))
    # Else XLA fuses the next level of the tree into this pass, which then takes four times as long.
    return lax.optimization_barrier(sums)

  def mass(self, lowest: Array) -> Array:
    """f32[R], the weight of all tokens that are not below `lowest`."""
    return sum_tree(self.sums(lowest))[1]


def draw(logits: Array, maxima: Array, highest: Array, inputs: SamplingInputs, positions: Array,
         features: SamplingFeatures) -> Array:
  """Steps 5 to 7 of `sample`; `maxima` are those of each column, `highest` of all.

  The nucleus is never computed. A token is drawn from all that are left, and
  it lies in the nucleus if the tokens more likely than it have less than
  top_p of the mass. If not, neither it nor any less likely one does: they are
  struck out and the draw is repeated. That is rejection sampling, so what it
  accepts is distributed as the nucleus exactly. The pass over the vocabulary
  that tests a token also sums the mass for its successor, and few are needed;
  all but the first are over the rows in doubt alone.
  """
  temperature = jnp.maximum(inputs.temperature, _MIN_TEMPERATURE)
  lowest = jnp.full_like(highest, -jnp.inf)
  if features.min_p:  # two roundings, in whatever program
    lowest = highest + lax.optimization_barrier(temperature * jnp.log(inputs.min_p))
  if features.max_top_k:
    kth = kth_largest(logits, maxima, inputs.top_k, features.max_top_k)
    lowest = jnp.maximum(lowest, jnp.where(inputs.top_k > 0, kth, -jnp.inf))

  weights = Weights(logits, highest, 1 / temperature)
  row_keys = jax.vmap(_row_key)(inputs.seed, inputs.sample_index, positions)
  attempts = jnp.zeros(highest.shape, jnp.int32)
  tree, mass = sum_tree(weights.sums(lowest))
  tokens = _descend(weights, tree, lowest, row_keys, attempts)
  if not features.top_p:
    return tokens
  nucleus_mass = inputs.top_p * mass
  always = inputs.top_p >= 1

  def propose_again(weights, tokens, nucleus_mass, row_keys, attempts):
    """Whether each token is accepted, and its successor if it is not."""
    drawn = jnp.take_along_axis(weights.logits, tokens[:, None], axis=1)[:, 0]
    above = _next_up(drawn)
    tree, mass_above = sum_tree(weights.sums(above))
    accepted = (mass_above < nucleus_mass) | (mass_above == 0)
    again = _descend(weights, tree, above, row_keys, attempts)
    return accepted, jnp.where(accepted, tokens, again)

  num_rows = len(highest)
  num_some = -(-num_rows // _SOME_ROWS)

  def for_some(carry):
    attempts, tokens, accepted = carry
    rows, = jnp.nonzero(~accepted, size=num_some, fill_value=num_rows)
    of = functools.partial(jnp.take, indices=rows, axis=0, mode="clip")
    some = jax.tree.map(of, (weights, tokens, nucleus_mass, row_keys, attempts + 1))
    some_accepted, some_tokens = propose_again(*some)
    return (attempts.at[rows].add(1, mode="drop"), tokens.at[rows].set(some_tokens, mode="drop"),
            accepted.at[rows].set(some_accepted, mode="drop"))

  accepted, proposed = propose_again(weights, tokens, nucleus_mass, row_keys, attempts + 1)
  tokens, accepted = jnp.where(always, tokens, proposed), accepted | always
  return lax.while_loop(lambda carry: ~carry[2].all(), for_some, (attempts + 1, tokens, accepted))[1]


def _row_key(seed: Array, sample_index: Array, position: Array) -> Array:
  key = jax.random.key(seed, impl="threefry2x32")
  return jax.random.fold_in(jax.random.fold_in(key, sample_index), position)


def _next_up(x: Array) -> Array:
  """The next larger float32 of a finite x."""
  bits = lax.bitcast_convert_type(x + 0.0, jnp.int32)  # of the two zeros, the positive one
  return lax.bitcast_convert_type(jnp.where(x >= 0, bits + 1, bits - 1), jnp.float32)


def kth_largest(logits: Array, maxima: Array, k: Array, max_k: int) -> Array:
  """The k-th largest of each row of f32[R, V]; `maxima` are those of its `columns`."""
  vocab_size = logits.shape[1]
  k = jnp.clip(k, 1, vocab_size)[:, None]
  if vocab_size <= 2 * _FAN_OUT * max_k <= 2 * _FAN_OUT * _MAX_SELECT:
    return jnp.take_along_axis(lax.top_k(logits, min(max_k, vocab_size))[0], k - 1, axis=1)[:, 0]
  if max_k <= _MAX_SELECT:  # they lie in the columns with the largest maxima
    _, nodes = largest(maxima, max_k)
    places = nodes[:, None] + maxima.shape[1] * jnp.arange(_FAN_OUT, dtype=nodes.dtype)[:, None]
    return jnp.take_along_axis(_best_of(logits, places, max_k)[0], k - 1, axis=1)[:, 0]
  # As integers in the order of the floats.
  bits = lax.bitcast_convert_type(logits, jnp.int32)
  keys = bits ^ ((bits >> 31) & jnp.int32(2**31 - 1))

  def decide_bit(i, kth):
    candidate = kth + jnp.left_shift(jnp.int32(1), 31 - i)  # from the least integer on, wrapping once
    # Counts below 2**24 are exact in float32, whose sums CPUs vectorise better.
    num_above = (keys >= candidate).astype(jnp.float32).sum(axis=1)
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


def columns(x: Array, fill: float = -jnp.inf) -> list[Array]:
  """f32[R, N] as up to `_FAN_OUT` arrays f32[R, C], `fill` at the end; element n lies in column n % C."""
  size = x.shape[1]
  num_columns = -(-size // min(size, _FAN_OUT))
  columns = [x[:, i:i + num_columns] for i in range(0, size, num_columns)]
  short = num_columns - columns[-1].shape[1]
  return [*columns[:-1], jnp.pad(columns[-1], ((0, 0), (0, short)), constant_values=fill)]


def sum_tree(sums: Array) -> tuple[list[Array], Array]:
  """A tree of sums over f32[R, C], and their total f32[R].

  Level 0 is `sums`, the last one the root's children. Entry c of a level sums column c of the
  level below, written out term by term: an order that no compiler changes.
  """
  levels = [sums]
  while levels[-1].shape[1] > _FAN_OUT:
    levels.append(functools.reduce(operator.add, columns(levels[-1], 0.0)))
  return levels, functools.reduce(operator.add, (levels[-1][:, i] for i in range(levels[-1].shape[1])))


def _descend(weights: Weights, tree: list[Array], lowest: Array, row_keys: Array,
             attempts: Array) -> Array:
  """Draws a token in proportion to its weight: from the root, a child in proportion to its sum.

  The child is drawn by the Gumbel maximum, which never takes one of weight 0.
  Its random numbers are few: one for each child of the nodes on the way down.
  """
  shape = (len(tree) + 1, _FAN_OUT)
  gumbel = jax.vmap(lambda key, attempt: jax.random.gumbel(jax.random.fold_in(key, attempt), shape)
                    )(row_keys, attempts)
  node = jnp.zeros((len(row_keys), 1), jnp.int32)
  num_nodes = 1
  for i, level in enumerate([*reversed(tree), weights.logits]):
    size = level.shape[1]
    children = node + num_nodes * jnp.arange(-(-size // num_nodes), dtype=jnp.int32)
    values = jnp.take_along_axis(level, jnp.minimum(children, size - 1), axis=1)
    if level is weights.logits:
      values = weights.of(values, lowest)
    values = jnp.where(children < size, values, 0.0)
    child = jnp.argmax(jnp.log(values) + gumbel[:, i, :children.shape[1]], axis=1)
    node = jnp.take_along_axis(children, child[:, None], axis=1)
    num_nodes = size
  return node[:, 0]
