"""The compiled steps: one mixed step, or a loop of decode steps, on the device."""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from batchjax.cache.kv_state import KV_AXES, KVState
from batchjax.engine import sampling
from batchjax.engine.sampling_inputs import SamplingFeatures
from batchjax.sharding import spec_of
from batchjax.types import StepInputs, StepOutputs

# Prompt log-probabilities hold the logits of this many tokens at a time: so many that reading the
# unembedding for each block hides behind the products.
_LOGITS_BLOCK = 512


@flax.struct.dataclass
class EngineState:
  """What lives on the device between steps; donated to every step.

  Attributes:
    kv: the page pool.
    last_tokens: i32[slots], the token each slot's row drew last.
    done: bool[slots], the row has finished; its steps still in flight change nothing.
    stop_states: i32[slots], state of the row's stop automaton.
    penalties: token counts, None when the job has no penalties.
  """

  kv: KVState
  last_tokens: Int[Array, "slots"]
  done: Bool[Array, "slots"]
  stop_states: Int[Array, "slots"]
  penalties: sampling.PenaltyState | None


def init_engine_state(kv: KVState, max_rows: int, vocab_size: int,
                      features: SamplingFeatures) -> EngineState:
  """Empty slots over an empty pool.

  >>> features = batchjax.SamplingFeatures.of([batchjax.SamplingParams()], eos_token_ids=())
  >>> kv = batchjax.init_kv_state(model.config, num_pages=8, page_size=16)
  >>> state = batchjax.init_engine_state(kv, 4, model.config.vocab_size, features)
  >>> state.done.tolist()
  [True, True, True, True]
  """
  return EngineState(kv=kv, last_tokens=jnp.zeros(max_rows, jnp.int32),
                     done=jnp.ones(max_rows, bool), stop_states=jnp.zeros(max_rows, jnp.int32),
                     penalties=sampling.PenaltyState.create(max_rows, vocab_size, features))


def state_specs(num_layers: int, features: SamplingFeatures) -> EngineState:
  """How an engine's state is split on a mesh: `PartitionSpec` in place of its arrays."""
  whole, counts = spec_of(()), spec_of((None, "vocab"))
  return EngineState(
      kv=KVState((spec_of(KV_AXES),) * num_layers), last_tokens=whole, done=whole, stop_states=whole,
      penalties=sampling.PenaltyState(counts) if features.penalties else None)


def mixed_step(module: Any, features: SamplingFeatures, params: Any,
               stop_transitions: Int[Array, "U V"] | None, state: EngineState,
               inputs: StepInputs) -> tuple[StepOutputs, EngineState]:
  """Decode rows and prefill chunks in one forward pass; rows whose prompt is complete draw.

  Args:
    module: a `Transformer`, or what has its `__call__`, `make_schedule`, `logits` and `split`; on a
      mesh it is that of one device's share, and so are `params` and `state`.
    features: what sampling has to do (static).
    params: of the module.
    stop_transitions: of the stop table, None where no job has stop strings.
    state: donated.
    inputs: from `pack`.

  Returns:
    Outputs with a leading axis of one, and the next state.

  Behind the example of `pack`:

  >>> module = batchjax.Transformer(model.config, engine.page_size)
  >>> kv = batchjax.init_kv_state(model.config, plan.num_pages, engine.page_size)
  >>> state = batchjax.init_engine_state(kv, 8, model.config.vocab_size, features)
  >>> step = jax.jit(batchjax.mixed_step, static_argnums=(0, 1))
  >>> outputs, state = step(module, features, model.params, None, state, inputs)
  >>> bool(outputs.tokens[0, 0] == state.last_tokens[0])
  True
  """
  hidden, outputs, state = _advance(module, features, params, stop_transitions, state, inputs)
  outputs = jax.tree.map(lambda x: x[None], outputs)
  if features.prompt_logprobs:
    scores = sampling.prompt_logprobs(
        hidden, inputs.next_tokens, lambda h: module.apply(params, h, method="logits"),
        _LOGITS_BLOCK, features.num_top_logprobs, module.split)
    outputs = outputs._replace(prompt_logprobs=scores[0], prompt_top_token_ids=scores[1],
                               prompt_top_logprobs=scores[2])
  return outputs, state


def decode_loop(module: Any, features: SamplingFeatures, max_steps: int, params: Any,
                stop_transitions: Int[Array, "U V"] | None, state: EngineState,
                inputs: StepInputs, num_steps: Int[Array, ""]) -> tuple[StepOutputs, EngineState]:
  """Up to `num_steps` decode steps, at least one, without the host; ends when every row is done.

  Args:
    max_steps: length of the output's leading axis (static).
    inputs: the first step; row r is token r, and each row's own run has the
      pages for `num_steps` more tokens.
    num_steps: 1 to `max_steps`.

  Returns:
    Outputs with -1 tokens for steps that a row did not take, and the next state.

  Behind the example of `mixed_step`:

  >>> batch = scheduler.next_batch()
  >>> bucket = plan.bucket_for(batch.kind, batch.num_tokens)
  >>> inputs = batchjax.pack(batch, bucket, table, page_size=engine.page_size)
  >>> loop = jax.jit(batchjax.decode_loop, static_argnums=(0, 1, 2))
  >>> outputs, state = loop(module, features, engine.max_decode_steps, model.params, None, state,
  ...                       inputs, jnp.int32(batch.num_steps))
  >>> int((outputs.tokens[:, 0] >= 0).sum()) == batch.num_steps
  True
  """
  page_size = state.kv.page_size
  schedule = module.apply(params, _last_inputs(inputs, num_steps), method="make_schedule")
  buffers = _empty_outputs(max_steps, inputs.slots.shape[0], features)

  def go_on(carry):
    step, state, inputs, _ = carry
    running = (inputs.slots >= 0) & ~jnp.take(state.done, inputs.slots, mode="clip")
    return (step < num_steps) & ((step == 0) | running.any())

  def body(carry):
    step, state, inputs, buffers = carry
    _, outputs, state = _advance(module, features, params, stop_transitions, state, inputs,
                                 schedule)
    buffers = jax.tree.map(lambda b, x: b.at[step].set(x), buffers, outputs)
    return step + 1, state, _next_inputs(inputs, page_size), buffers

  _, state, _, buffers = jax.lax.while_loop(go_on, body, (0, state, inputs, buffers))
  return buffers, state


def _empty_outputs(max_steps: int, num_rows: int, features: SamplingFeatures) -> StepOutputs:
  """Outputs of a decode loop whose rows have drawn nothing."""
  num_top = features.num_top_logprobs if features.logprobs else 0
  zeros = lambda dtype, *width: jnp.zeros((max_steps, num_rows, *width), dtype)
  return StepOutputs(
      tokens=jnp.full((max_steps, num_rows), -1, jnp.int32), finish=zeros(jnp.int8),
      logprobs=zeros(jnp.float32) if features.logprobs else None,
      top_token_ids=zeros(jnp.int32, num_top) if num_top else None,
      top_logprobs=zeros(jnp.float32, num_top) if num_top else None)


def _last_inputs(inputs: StepInputs, num_steps: Int[Array, ""]) -> StepInputs:
  """The inputs with each row's own KV as long as it is in the last step of the loop."""
  segments, own = inputs.segments, inputs.own_segments
  # A row has no pages for tokens past its `max_tokens`.
  more = jnp.minimum(num_steps, inputs.sampling.max_tokens - inputs.num_generated) - 1
  grown = segments.kv_len.at[jnp.where(own < 0, segments.kv_len.shape[0], own)].add(
      jnp.maximum(more, 0), mode="drop")
  return inputs._replace(segments=segments._replace(kv_len=grown))


def _next_inputs(inputs: StepInputs, page_size: int) -> StepInputs:
  """The decode step after this one: every row one token further, in its own run."""
  segments, own = inputs.segments, inputs.own_segments
  own_of = lambda field: jnp.take(field, own, mode="clip")
  positions = jnp.where(inputs.positions < 0, -1, inputs.positions + 1)
  in_run = positions - own_of(segments.kv_start)
  page = jnp.take(inputs.page_indices, own_of(segments.page_start) + in_run // page_size,
                  mode="clip")
  return inputs._replace(
      tokens=jnp.full_like(inputs.tokens, -1), positions=positions,
      write_slots=jnp.where(own < 0, -1, page * page_size + in_run % page_size),
      is_first=jnp.zeros_like(inputs.is_first), num_generated=inputs.num_generated + 1)


def _advance(module, features, params, stop_transitions, state, inputs, schedule=None):
  """One forward pass and one draw per row that is not done."""
  max_slots = state.done.shape[0]
  of_slot = lambda values, slots: jnp.take(values, slots, mode="clip")
  from_device = (inputs.tokens < 0) & (inputs.token_slots >= 0)
  tokens = jnp.where(from_device, of_slot(state.last_tokens, inputs.token_slots), inputs.tokens)
  finished = from_device & of_slot(state.done, inputs.token_slots)
  model_inputs = inputs._replace(tokens=tokens,
                                 write_slots=jnp.where(finished, -1, inputs.write_slots))
  hidden, kv = module.apply(params, model_inputs, state.kv, schedule)

  draws = ((inputs.slots >= 0) & (inputs.sampling.max_tokens > 0)
           & (inputs.is_first | ~of_slot(state.done, inputs.slots)))
  logits = module.apply(params, jnp.take(hidden, inputs.sample_tokens, axis=0, mode="clip"),
                        method="logits")
  with jax.named_scope("sample"):
    position = of_slot(inputs.positions, inputs.sample_tokens) + 1
    drawn, is_finite = sampling.sample(logits, inputs.sampling, position, inputs.num_generated,
                                       features, state.penalties, inputs.slots, module.split)
    drawn = jnp.where(draws, drawn, -1)
    stop_states = None
    if features.stop_strings:
      entered = jnp.where(inputs.is_first, inputs.stop_states,
                          of_slot(state.stop_states, inputs.slots))
      stop_states = sampling.advance_stop(stop_transitions, inputs.sampling.automaton, entered,
                                          drawn)
    finish = sampling.finish_reasons(drawn, is_finite, inputs.num_generated + 1, inputs.sampling,
                                     stop_states)
    finish = jnp.where(draws, finish, 0).astype(jnp.int8)
    logprobs = top_ids = top_logprobs = None
    if features.logprobs:
      logprobs, top_ids, top_logprobs = sampling.token_logprobs(
          logits, drawn, features.num_top_logprobs, module.split)

  target = jnp.where(draws, inputs.slots, max_slots)
  put = lambda old, new: old.at[target].set(new, mode="drop")
  state = EngineState(
      kv=kv, last_tokens=put(state.last_tokens, drawn), done=put(state.done, finish > 0),
      stop_states=state.stop_states if stop_states is None else put(state.stop_states, stop_states),
      penalties=state.penalties if state.penalties is None else sampling.count(
          state.penalties, jnp.where(draws, inputs.slots, -1), drawn, module.split))
  return hidden, StepOutputs(drawn, finish, logprobs, top_ids, top_logprobs), state
