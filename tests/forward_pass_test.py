"""Whole sequences: equal to the engine, differentiable, and causal."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from batchjax.config import ConfigError, EngineConfig
from batchjax.forward_pass import forward
from batchjax.generation import generate
from batchjax.models import SHAPES
from batchjax.types import Request, SamplingParams
from batchjax.weights import Model
from batchjax.weights.random import random_params

TOKENS = np.random.default_rng(0).integers(3, 256, (3, 12)).astype(np.int32)

pytestmark = pytest.mark.usefixtures("quick_compiler_of_module")


def random_model(shape: str, **changes) -> Model:
  config = dataclasses.replace(SHAPES[shape], **changes)
  return Model(config, random_params(config, seed=3))


@pytest.fixture(scope="module")
def gemma() -> Model:
  return random_model("tiny_gemma3")


def loss_of(model: Model, tokens: jax.Array, checkpoint: bool = False) -> jax.Array:
  logits = forward(model, tokens[..., :-1], checkpoint=checkpoint).logits
  return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[..., 1:]).mean()


GRADIENT = jax.jit(jax.grad(loss_of), static_argnums=2)


def assert_close(got, want, atol=1e-5):
  assert jax.tree.structure(got) == jax.tree.structure(want)
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=atol), got, want)


def test_log_probabilities_are_those_of_a_job():
  """The whole engine, with a shared prefix; `models/transformer_test` has all families."""
  model = random_model("tiny_gemma2")
  prompts = [TOKENS[0], np.append(TOKENS[0, :9], TOKENS[1, :3]), TOKENS[2, :7]]
  requests = [Request(str(i), prompt, SamplingParams(max_tokens=1, prompt_logprobs=True))
              for i, prompt in enumerate(prompts)]
  engine = EngineConfig(num_pages=64, page_size=4, max_rows=4, max_step_tokens=32, max_buckets=1,
                        compilation_cache_dir="")
  done = {c.request_id: c for c in generate(model, requests, engine)}
  assert sum(c.num_cached_tokens for c in done.values()) >= 8
  for i, prompt in enumerate(prompts):
    logprobs = jax.nn.log_softmax(forward(model, prompt).logits)
    np.testing.assert_allclose(done[str(i)].prompt_logprobs[1:],
                               logprobs[np.arange(len(prompt) - 1), prompt[1:]], rtol=0, atol=1e-5)


def test_shapes_and_hidden_states(gemma):
  outputs = forward(gemma, TOKENS)
  assert len(outputs.hidden_states) == gemma.config.num_layers + 1
  assert {x.shape for x in outputs.hidden_states} == {(3, 12, 32)}
  table = gemma.params["params"]["embed"]["embedding"]
  np.testing.assert_allclose(outputs.hidden_states[0],
                             table[TOKENS] * np.float32(gemma.config.embed_scale), rtol=1e-6)
  np.testing.assert_allclose(outputs.logits, outputs.hidden_states[-1] @ table.T, atol=1e-5)
  assert_close(forward(gemma, TOKENS[None]), jax.tree.map(lambda x: x[None], outputs))
  assert_close(forward(gemma, TOKENS[1].tolist()), jax.tree.map(lambda x: x[1], outputs))


def test_what_stands_behind_a_token_does_not_reach_it(gemma):
  changed = TOKENS.copy()
  changed[:, 7:] = 0
  got, want = forward(gemma, changed).logits, forward(gemma, TOKENS).logits
  np.testing.assert_allclose(got[:, :7], want[:, :7], atol=1e-6)
  assert np.abs(got[:, 7] - want[:, 7]).max() > 1e-2


def test_jit_gives_the_same(gemma):
  assert_close(jax.jit(forward)(gemma, TOKENS), forward(gemma, TOKENS))


def test_gradients_are_slopes(gemma):
  """Of a model as of a tree of parameters, along a random direction."""
  model = jax.tree.map(lambda p: p + 0.01, gemma)  # norms away from where they start
  gradient = GRADIENT(model, TOKENS)
  assert isinstance(gradient, Model) and gradient.config == gemma.config
  assert all(np.abs(g).max() > 0 for g in jax.tree.leaves(gradient))  # every parameter has a part
  rng, step, loss = np.random.default_rng(1), 1e-2, jax.jit(loss_of)
  direction = jax.tree.map(lambda p: rng.normal(size=p.shape).astype(np.float32) / 10, model)
  moved = lambda sign: jax.tree.map(lambda p, d: p + sign * step * d, model, direction)
  slope = (loss(moved(1), TOKENS) - loss(moved(-1), TOKENS)) / (2 * step)
  expected = sum(jax.tree.leaves(jax.tree.map(lambda g, d: (g * d).sum(), gradient, direction)))
  np.testing.assert_allclose(slope, expected, rtol=2e-2)


def test_vmap_gives_gradients_of_each_example_and_runs_models_side_by_side(gemma):
  each = jax.jit(jax.vmap(jax.grad(loss_of), (None, 0)))(gemma, TOKENS)
  assert_close(jax.tree.map(lambda g: g.mean(0), each), GRADIENT(gemma, TOKENS))
  pair = jax.tree.map(lambda p: jnp.stack([p, 0.9 * p]), gemma)
  logits = jax.vmap(lambda model: forward(model, TOKENS).logits)(pair)
  np.testing.assert_allclose(logits[0], forward(gemma, TOKENS).logits, atol=1e-5)
  assert np.abs(logits[1] - logits[0]).max() > 1e-2


def test_checkpoints_hold_less_and_change_no_gradient(gemma):
  held = {}
  for checkpoint in (False, True):
    _, vjp = jax.vjp(lambda model: loss_of(model, TOKENS, checkpoint), gemma)
    held[checkpoint] = sum(x.nbytes for x in jax.tree.leaves(vjp))
  assert held[True] < held[False] / 2
  want = GRADIENT(gemma, TOKENS)
  assert_close(GRADIENT(gemma, TOKENS, True), want)
  assert_close(jax.jit(jax.grad(jax.checkpoint(loss_of)))(gemma, TOKENS), want)


def test_sixteen_bits_stay_sixteen_bits():
  outputs = jax.eval_shape(forward, random_model("tiny_qwen3", dtype="bfloat16"), TOKENS)
  assert {x.dtype.name for x in outputs.hidden_states} == {"bfloat16"}
  assert outputs.logits.dtype == jnp.float32


@pytest.mark.parametrize("tokens, told", [
    (np.ones((2, 3), np.float32), r"must be integers.*got float32\[2, 3\]"),
    (3, r"got int32\[\]"),
    (np.zeros((2, 0), np.int32), r"at least one token"),
    (np.zeros((1, 1025), np.int32), "1025 tokens, the model takes 1024: shorten them"),
])
def test_what_is_no_sequence_is_refused(tokens, told):
  with pytest.raises(ConfigError, match=told):
    forward(Model(SHAPES["tiny_llama"], {}), tokens)
