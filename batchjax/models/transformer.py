"""A decoder-only transformer over flat tokens, with or without paged KV, for all `ModelConfig`s."""

import contextlib
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from batchjax.cache.kv_state import KVState, init_kv_state
from batchjax.config import ModelConfig
from batchjax.models import layers
from batchjax.ops import attention as attention_op
from batchjax.ops.causal import WholeRows
from batchjax.sharding import Split
from batchjax.types import Segments, StepInputs


def _float32_products(method):
  """Has the products of float32 models done in float32: accelerators round operands otherwise."""
  @functools.wraps(method)
  def wrapped(self, *args, **kwargs):
    is_float32 = self.config.dtype == "float32"
    with jax.default_matmul_precision("highest") if is_float32 else contextlib.nullcontext():
      return method(self, *args, **kwargs)
  return wrapped


class Block(nn.Module):
  """One layer: attention and feed-forward, each behind a norm and a residual sum."""

  config: ModelConfig
  kind: str
  split: Split = Split()

  @nn.compact
  def __call__(self, x, rope, kv_pages, write_slots, schedule):
    c = self.config
    norm = lambda name: layers.RMSNorm(c.norm_eps, c.norm_plus_one, c.dtype, name=name)
    y, kv_pages = layers.Attention(c, self.kind, self.split, name="attn")(
        norm("attn_norm")(x), rope, kv_pages, write_slots, schedule)
    x = x + (norm("post_attn_norm")(y) if c.post_norms else y)
    y = layers.FeedForward(c, self.split, name="ffn")(norm("ffn_norm")(x))
    return x + (norm("post_ffn_norm")(y) if c.post_norms else y), kv_pages


@functools.partial(jax.jit, static_argnums=0)
def _apply_block(block: Block, *arguments: Any) -> tuple[Array, Array | None]:
  """Layers of a kind are one function, traced and lowered once; only XLA sees one for each layer."""
  return block.apply(*arguments)


class Transformer(nn.Module):
  """The model of a step.

  `apply(params, inputs, kv)` gives the hidden vectors of all flat tokens and
  the pool with their KV; `apply(params, hidden, method="logits")` gives the
  logits of those that are needed; `apply(params, tokens, method="whole")` needs no
  pool. `params` is `{"params": tree}`, boxed with
  logical axis names or not.

  Attributes:
    config: shapes and family traits.
    page_size: tokens of a KV page.
    attention: implementation of the attention op; None picks by device.
    max_levels: most shared nodes above a row's own KV.
    split: the devices that share the model; `config` is then of one device's share.

  >>> module = batchjax.Transformer(model.config, page_size=16)
  >>> hidden = module.apply(model.params, jnp.array([[7, 8, 9]]), method="whole")[-1]
  >>> module.apply(model.params, hidden[0, -1], method="logits").shape == (model.config.vocab_size,)
  True
  """

  config: ModelConfig
  page_size: int
  attention: str | None = None
  max_levels: int = 4
  split: Split = Split()

  def setup(self):
    c = self.config
    self.embed = layers.VocabTable(c, "embedding", self.split)
    self.layers = [Block(c, kind, self.split) for kind in c.layer_kinds]
    self.final_norm = layers.RMSNorm(c.norm_eps, c.norm_plus_one, c.dtype)
    self.lm_head = self.embed if c.tie_embeddings else layers.VocabTable(c, "kernel", self.split)

  def make_schedule(self, inputs: StepInputs) -> attention_op.Schedule:
    """The work list of attention for a step, or for all steps of a decode loop."""
    return attention_op.make_schedule(
        inputs.segments, inputs.page_indices, inputs.positions, config=self.config,
        page_size=self.page_size, max_levels=self.max_levels, implementation=self.attention)

  @_float32_products
  def __call__(self, inputs: StepInputs, kv: KVState,
               schedule: attention_op.Schedule | None = None
               ) -> tuple[Float[Array, "T D"], KVState]:
    """Computes the final-norm hidden vectors [T, D] and writes the tokens' KV.

    Args:
      inputs: tokens already resolved (>= 0); padding (-1) gives unspecified
        but finite vectors and writes nothing where its write slot is -1.
      kv: the pool; donate it to have it updated in place.
      schedule: that of the decode loop which this step is in; None makes one for this step.
    """
    schedule = (self.make_schedule(inputs) if schedule is None
                else attention_op.advance(schedule, inputs.positions))
    hidden, pages = self._layers(inputs.tokens, inputs.positions, kv.pages, inputs.write_slots,
                                 schedule)
    if self.is_initializing():
      self.logits(hidden[-1])  # creates the parameters that only `logits` reads
    return hidden[-1], kv.replace(pages=pages)

  @_float32_products
  def whole(self, tokens: Int[Array, "B S"],
            checkpoint: bool = False) -> tuple[Float[Array, "B S D"], ...]:
    """Hidden vectors of whole sequences, without a pool: see `forward_pass.forward`."""
    rows, row_len = tokens.shape
    positions = jnp.tile(jnp.arange(row_len, dtype=jnp.int32), rows)
    hidden, _ = self._layers(tokens.reshape(-1), positions, (None,) * self.config.num_layers, None,
                             WholeRows(row_len), checkpoint)
    return tuple(x.reshape(rows, row_len, -1) for x in hidden)

  def _layers(self, tokens, positions, pools, write_slots, schedule, checkpoint=False):
    """The embeddings and what each layer leaves, the last one normed; and the layers' pools."""
    c = self.config
    ropes = {kind: layers.rope_table(c, kind, positions) for kind in set(c.layer_kinds)}
    x = self.embed.lookup(tokens)
    if c.embed_scale != 1.0:
      x = x * jnp.asarray(c.embed_scale, x.dtype)
    apply_block = jax.checkpoint(_apply_block, static_argnums=0) if checkpoint else _apply_block
    hidden, new_pools = [x], []
    for layer, kind, pool in zip(self.layers, c.layer_kinds, pools, strict=True):
      arguments = x, ropes[kind], pool, write_slots, schedule
      x, pool = (layer(*arguments) if self.is_initializing()
                 else apply_block(Block(c, kind, self.split, parent=None), layer.variables,
                                  *arguments))
      hidden.append(x)
      new_pools.append(pool)
    return [*hidden[:-1], self.final_norm(x)], tuple(new_pools)

  @_float32_products
  def logits(self, hidden: Float[Array, "... D"]) -> Float[Array, "... V"]:
    """Float32 logits over the vocabulary, or this device's part of it; soft cap included."""
    with jax.named_scope("logits"):
      logits = self.lm_head.logits(hidden)
      cap = self.config.final_soft_cap
      return self.split.mask_padding(logits if cap is None else cap * jnp.tanh(logits / cap))


def init_params(config: ModelConfig, key: jax.Array) -> dict[str, Any]:
  """Random parameters, boxed with their logical axis names (`nn.unbox` strips them).

  `jax.eval_shape` of it gives the shapes and dtypes without memory.
  """
  null, zero = jnp.full(1, -1, jnp.int32), jnp.zeros(1, jnp.int32)
  inputs = StepInputs(
      tokens=null, positions=null, token_slots=null, write_slots=null,
      segments=Segments(*(zero for _ in Segments._fields)),
      page_indices=zero, sample_tokens=null, slots=null, own_segments=null,
      is_first=null, stop_states=null, num_generated=null, sampling=None)
  init = lambda key: Transformer(config, page_size=1, attention="reference").init(
      key, inputs, init_kv_state(config, num_pages=1, page_size=1))["params"]
  return jax.jit(init)(key)
