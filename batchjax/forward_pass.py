"""Whole sequences in, logits and hidden vectors out: the model as training and analysis use it."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from batchjax.config import ConfigError
from batchjax.models import Transformer
from batchjax.weights import Model


class ForwardOutputs(NamedTuple):
  """What the model makes of sequences.

  Attributes:
    logits: f32[..., S, V], of the token behind each token.
    hidden_states: num_layers + 1 arrays [..., S, D] in the model's dtype: the embeddings, then what
      each layer leaves; the last one is behind the final norm, and logits are made of it.

  >>> outputs = batchjax.forward(model, np.array(tokenizer.encode("The end")))
  >>> len(outputs.hidden_states) == model.config.num_layers + 1
  True
  """

  logits: Float[Array, "... S V"]
  hidden_states: tuple[Float[Array, "... S D"], ...]


def forward(model: Model, token_ids: Int[Array, "... S"], *,
            checkpoint: bool = False) -> ForwardOutputs:
  """Logits and hidden vectors of whole sequences, each token seeing itself and those before it.

  A pure function of the parameters that `generate` uses, equal to what it computes: for `jax.jit`,
  `jax.grad`, `jax.vmap`. `Model` is a pytree, so `jax.grad` of a function of the model gives a
  model of gradients. What goes unused costs nothing under `jax.jit`.

  Args:
    model: configuration and parameters.
    token_ids: integers [..., S]. Pad shorter sequences at their end, with any ids of the
      vocabulary: what stands behind a token does not reach it. Ids outside the vocabulary are not
      found out.
    checkpoint: have the backward pass compute each layer anew, and hold no more of it than its
      input (`jax.checkpoint`).

  Raises:
    ConfigError: `token_ids` are no integers, have no token, or exceed the model's context.

  >>> tokens = np.array([[7, 8, 9, 10], [7, 8, 9, 11]])
  >>> outputs = batchjax.forward(model, tokens)
  >>> outputs.logits.shape == (*tokens.shape, model.config.vocab_size)
  True
  >>> def loss(model):
  ...   logits = batchjax.forward(model, tokens[:, :-1]).logits
  ...   return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()
  >>> gradients = jax.grad(loss)(model)
  >>> updated = jax.tree.map(lambda p, g: p - 0.1 * g, model, gradients)
  >>> bool(loss(updated) < loss(model))
  True
  """
  token_ids = jnp.asarray(token_ids)
  shape = token_ids.shape
  if not shape or not shape[-1] or not jnp.issubdtype(token_ids.dtype, jnp.integer):
    raise ConfigError("token_ids must be integers [..., S] with at least one token, got "
                      f"{token_ids.dtype}{list(shape)}")
  *rows, length = shape
  if length > model.config.max_len:
    raise ConfigError(f"token_ids have sequences of {length} tokens, the model takes "
                      f"{model.config.max_len}: shorten them")
  module = Transformer(model.config, page_size=1)
  hidden = module.apply(model.params, token_ids.reshape(-1, length), checkpoint, method="whole")
  hidden = tuple(x.reshape(*rows, length, -1) for x in hidden)
  return ForwardOutputs(module.apply(model.params, hidden[-1], method="logits"), hidden)
