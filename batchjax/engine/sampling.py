"""Logits to tokens on the device: adjusted, truncated, drawn, and checked for the end.

Every row is computed by itself, bit for bit: maxima and counts do not depend
on the order of evaluation, sums are written out in a fixed order, and random
bits come from the row's own (seed, sample index, position). A row's text
therefore depends on neither its neighbours nor the shape of the step.
"""

from collections.abc import Callable

import flax.struct
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, UInt16

from batchjax.engine import draw as draw_lib
from batchjax.engine.sampling_inputs import MAX_COUNT, SamplingFeatures
from batchjax.sharding import Split
from batchjax.types import SamplingInputs

# Up to so many tokens are struck out by comparing, more by a scatter.
_MAX_COMPARED = 8


@flax.struct.dataclass
class PenaltyState:
  """What the penalties must know of each slot; None in its place when no row has penalties.

  Attributes:
    seen: what each token is to the slot's row: `IN_PROMPT`, and how often it was generated, counted up
      to `MAX_COUNT`.
  """

  seen: UInt16[Array, "slots V"]

  @classmethod
  def create(cls, max_rows: int, vocab_size: int, features: SamplingFeatures) -> "PenaltyState | None":
    """Empty slots, or None when the job has no penalties."""
    return cls(jnp.zeros((max_rows, vocab_size), jnp.uint16)) if features.penalties else None


def admit(state: PenaltyState, fresh: Int[Array, "slots"], slots: Int[Array, "C"],
          tokens: Int[Array, "C"], seen: UInt16[Array, "C"], split: Split = Split()) -> PenaltyState:
  """Starts slots over with what is known of tokens (see `pack_admissions`); -1 is padding."""
  max_rows, vocab_size = state.seen.shape
  values = state.seen.at[_drop_null(fresh, max_rows)].set(0, mode="drop")
  where = _drop_null(slots, max_rows), _drop_null(split.places(tokens), vocab_size)
  return PenaltyState(values.at[where].set(seen, mode="drop"))


def count(state: PenaltyState, slots: Int[Array, "R"], tokens: Int[Array, "R"],
          split: Split = Split()) -> PenaltyState:
  """Counts one generated token per row; -1 in `slots` or `tokens` counts nothing."""
  max_rows, vocab_size = state.seen.shape
  places = split.places(tokens)
  seen = state.seen[jnp.maximum(slots, 0), jnp.clip(places, 0, vocab_size - 1)]
  where = (_drop_null(slots, max_rows), _drop_null(places, vocab_size))
  seen += (seen & MAX_COUNT) < MAX_COUNT
  return PenaltyState(state.seen.at[where].set(seen, mode="drop"))


def sample(logits: Float[Array, "R V"], inputs: SamplingInputs, positions: Int[Array, "R"],
           num_generated: Int[Array, "R"], features: SamplingFeatures,
           penalties: PenaltyState | None = None, slots: Int[Array, "R"] | None = None,
           split: Split = Split()) -> tuple[Int[Array, "R"], Bool[Array, "R"]]:
  """The next token of each row, and whether its logits are such that a token can be drawn.

  In this order, which is that of vLLM and Hugging Face:
    1. `logit_bias` is added;
    2. `repetition_penalty` over tokens of prompt and output (CTRL, section 4.1);
    3. `frequency_penalty` and `presence_penalty` over tokens of the output;
    4. stop tokens are masked until the row has `min_tokens` tokens;
    5. temperature; 0 takes the most likely token, the lowest id among equals;
    6. `min_p`, then `top_k`, then `top_p` of what these two left;
    7. a draw keyed by (seed, sample index, position).
  Truncation keeps all tokens that tie in probability with the last one kept.
  A logit of -inf makes a token impossible. NaN or +inf anywhere, or -inf everywhere, makes a
  row one that cannot be drawn from: its token means nothing.
  Tokens e**-60 times as likely as the most likely one are never drawn.

  Args:
    logits: of the model; softcaps are the model's matter.
    positions: absolute position that the new token will have.
    num_generated: tokens the row generated before this one.
    features: what the job uses (static).
    penalties: needed where `features.penalties`.
    slots: each row's slot in `penalties`; -1 is unused.
    split: of the vocabulary among devices, each with its part of `logits` and `penalties`; all get
      the tokens.

  Raises:
    ValueError: the penalty state is missing.

  >>> params = batchjax.SamplingParams(temperature=0.0)
  >>> features = batchjax.SamplingFeatures.of([params], eos_token_ids=())
  >>> inputs = batchjax.pack_sampling([params], [0], features, (), None, num_rows=1)
  >>> logits, zero = jnp.array([[0.0, 3.0, 1.0]]), jnp.zeros(1, jnp.int32)
  >>> tokens, is_drawable = batchjax.sample(logits, inputs, zero, zero, features)
  >>> tokens.tolist(), is_drawable.tolist()
  ([1], [True])
  """
  logits = _adjust(logits.astype(jnp.float32), inputs, num_generated, features, penalties, slots,
                   split)
  if features.greedy_only:
    tokens, highest = _argmax(logits, split)
    return tokens, _is_finite(highest)
  tokens, highest = draw_lib.draw(logits, inputs, positions, features, split)
  if features.any_greedy:
    tokens = jnp.where(inputs.temperature == 0, _argmax(logits, split)[0], tokens)
  return tokens, _is_finite(highest)


def finish_reasons(tokens: Int[Array, "R"], is_finite: Bool[Array, "R"],
                   num_generated: Int[Array, "R"], inputs: SamplingInputs,
                   stop_states: Int[Array, "R"] | None) -> Int[Array, "R"]:
  """Why each row ends: i8, 0 goes on, 1 stop token, 2 stop string, 3 length, 4 not finite.

  Where several hold, 4 is the reason, else the lowest. A row ends at a stop
  token or string only with more than `min_tokens` tokens: strings completed
  earlier are ignored, and matching starts afresh behind them.

  Args:
    is_finite: from `sample`.
    num_generated: tokens of the row, this one included.
    stop_states: from `advance_stop`; None when the job has no stop strings.
  """
  may_stop = num_generated > inputs.min_tokens
  is_stop_token = (inputs.stop_ids == tokens[:, None]).any(axis=1) & (tokens >= 0) & may_stop
  reasons = jnp.where(num_generated >= inputs.max_tokens, 3, 0)
  if stop_states is not None:
    reasons = jnp.where((stop_states < 0) & may_stop, 2, reasons)
  reasons = jnp.where(is_stop_token, 1, reasons)
  return jnp.where(is_finite, reasons, 4).astype(jnp.int8)


def advance_stop(transitions: Int[Array, "U V"], automaton: Int[Array, "R"],
                 states: Int[Array, "R"], tokens: Int[Array, "R"]) -> Int[Array, "R"]:
  """The automaton state of each row behind its new token; -1 says a stop string is complete.

  Rows without an automaton stay at 0, rows without a token (-1) where they
  are. A row that went on at -1 (see `finish_reasons`) starts afresh.
  """
  moved = transitions[jnp.maximum(automaton, 0) + jnp.maximum(states, 0), jnp.maximum(tokens, 0)]
  moved = jnp.where(tokens < 0, states, moved.astype(jnp.int32))
  return jnp.where(automaton < 0, 0, moved)


def token_logprobs(logits: Float[Array, "R V"], tokens: Int[Array, "R"], num_top: int,
                   split: Split = Split()) -> tuple[Float[Array, "R"], Array | None, Array | None]:
  """Log-probabilities under the model's own distribution: unmodified logits, temperature 1.

  Args:
    tokens: -1 gives NaN, and so does a row that `sample` cannot draw from.
    num_top: how many most likely alternatives to return.
    split: of the vocabulary, as in `sample`.

  Returns:
    The log-probability of each token, and ids i32[R, num_top] and
    log-probabilities f32[R, num_top] of the most likely ones, the lowest id
    first among equals; both None if `num_top` is 0.
  """
  logits = logits.astype(jnp.float32)
  highest, sums = draw_lib.highest_and_sums(logits, jnp.ones(len(logits)), split)
  total = draw_lib.sum_tree(sums, split)[1]
  log_normalizer = jnp.where(_is_finite(highest), highest + jnp.log(total), jnp.nan)
  chosen = draw_lib.logits_of(logits, jnp.maximum(tokens, 0), split)
  chosen = jnp.where(tokens < 0, jnp.nan, draw_lib.finite(chosen) - log_normalizer)
  if not num_top:
    return chosen, None, None
  if num_top == 1:
    return chosen, _argmax(logits, split)[0][:, None], (highest - log_normalizer)[:, None]
  top_logits, top_ids = _most_likely(logits, num_top, split)
  return chosen, top_ids, draw_lib.finite(top_logits) - log_normalizer[:, None]


def _most_likely(logits: Array, num_top: int, split: Split) -> tuple[Array, Array]:
  """The largest logits of each row and their ids, the lowest id first among equals."""
  if split.num_devices == 1:
    return draw_lib.largest(logits, num_top)
  best, places = draw_lib.largest(logits, min(num_top, logits.shape[1]))
  best, ids = split.gather(best), split.gather(split.token_ids(places))
  falling = -jnp.where(jnp.isnan(best), jnp.inf, best)  # NaN first
  _, ids, best = lax.sort((falling, ids, best), num_keys=2)
  return best[:, :num_top], ids[:, :num_top]


def prompt_logprobs(hidden: Float[Array, "T D"], next_tokens: Int[Array, "T"],
                    logits_fn: Callable[[Array], Array], block_len: int, num_top: int,
                    split: Split = Split()
                    ) -> tuple[Float[Array, "T"], Array | None, Array | None]:
  """`token_logprobs` of each token's successor, `block_len` tokens at a time.

  Only tokens with a successor cost anything: they are brought together, and as many blocks run, one
  after the other, as they fill. So logits of one block are held, and no more.

  Args:
    hidden: the final hidden states.
    next_tokens: the successor of each token in its prompt; -1 gives NaN.
    logits_fn: maps f[n, D] to f[n, V].
    split: of the vocabulary, as in `sample`.
  """
  num_tokens = len(next_tokens)
  block_len = min(block_len, num_tokens)
  is_scored = next_tokens >= 0
  # Filled up to whole blocks with places past the end, whose results are dropped.
  places, = jnp.nonzero(is_scored, size=-(-num_tokens // block_len) * block_len, fill_value=num_tokens)

  def score(i, out):
    here = lax.dynamic_slice(places, (i * block_len,), (block_len,))
    scores = token_logprobs(logits_fn(jnp.take(hidden, here, axis=0, mode="clip")),
                            jnp.take(next_tokens, here, mode="clip"), num_top, split)
    return jax.tree.map(lambda old, new: old.at[here].set(new, mode="drop"), out, scores)

  full = lambda value, *width: jnp.full((num_tokens, *width), value)
  empty = (full(jnp.nan), *(full(null, num_top) if num_top else None for null in (-1, jnp.nan)))
  return lax.fori_loop(0, (is_scored.sum() + block_len - 1) // block_len, score, empty)


def _drop_null(indices: Array, size: int) -> Array:
  """Moves -1, which would count from the end, past the end, where scatters drop it."""
  return jnp.where(indices < 0, size, indices)


def _is_finite(highest: Array) -> Array:
  """From the largest of a row's `finite` logits: none was NaN or +inf, and not all -inf."""
  return jnp.abs(highest) < draw_lib.LIMIT


def _argmax(logits: Array, split: Split) -> tuple[Array, Array]:
  """The id of each row's largest logit, the lowest among equals; and the logit.

  Column by column first: reductions of (value, index) pairs, as in jnp.argmax,
  or of integers along rows take several times as long on CPUs.
  """
  columns = [draw_lib.finite(column) for column in draw_lib.columns(logits, split)]
  highest = columns[0]
  ids = jnp.zeros(highest.shape, jnp.int32)
  for i, column in enumerate(columns[1:], start=1):
    is_higher = column > highest
    highest = jnp.where(is_higher, column, highest)
    ids = jnp.where(is_higher, i, ids)
  # Else GPUs fuse all this into the reduction below, and take twenty times as long.
  highest, ids = lax.optimization_barrier((highest, ids))
  ids = ids * ids.shape[1] + lax.broadcasted_iota(jnp.int32, ids.shape, 1)
  best = split.max(highest.max(axis=1))
  places = jnp.where(highest == best[:, None], ids, logits.shape[1]).min(axis=1)
  return split.first_token(places, logits.shape[1]), best


def _adjust(logits: Array, inputs: SamplingInputs, num_generated: Array,
            features: SamplingFeatures, penalties: PenaltyState | None,
            slots: Array | None, split: Split) -> Array:
  """Steps 1 to 4 of `sample`."""
  num_rows, vocab_size = logits.shape
  rows = jnp.arange(num_rows)[:, None]
  if features.num_bias:
    ids = _drop_null(split.places(inputs.bias_ids), vocab_size)
    logits = logits.at[rows, ids].add(inputs.bias_values, mode="drop")
  if features.penalties:
    if penalties is None or slots is None:
      raise ValueError("features.penalties needs the penalty state and the slots of its rows")
    seen = penalties.seen[jnp.maximum(slots, 0)]
    counts = (seen & MAX_COUNT).astype(jnp.int32)
    in_output = counts > 0
    repetition = jnp.where(seen > 0, inputs.repetition_penalty[:, None], 1.0)
    logits = jnp.where(logits > 0, logits / repetition, logits * repetition)
    logits -= counts * inputs.frequency_penalty[:, None]
    logits -= in_output * inputs.presence_penalty[:, None]
  if features.min_tokens and features.num_stop_ids:
    too_short = (num_generated < inputs.min_tokens)[:, None]
    ids = jnp.where(too_short, split.places(inputs.stop_ids), -1)
    if features.num_stop_ids <= _MAX_COMPARED:  # compared on the way, where a scatter copies
      token = lax.broadcasted_iota(jnp.int32, (1, vocab_size), 1)
      for i in range(features.num_stop_ids):
        logits = jnp.where(token == ids[:, i:i + 1], logits - jnp.inf, logits)  # NaN stays NaN
    else:
      logits = logits.at[rows, _drop_null(ids, vocab_size)].add(-jnp.inf, mode="drop")
  # Where sums were made, all that reads them must read the same ones.
  return lax.optimization_barrier(logits) if features.penalties else logits
