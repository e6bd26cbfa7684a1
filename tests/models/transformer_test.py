"""The transformer against the logits of `transformers`, however a prompt is cut into steps."""

import dataclasses
import json
import pathlib
from collections.abc import Iterable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from batchjax import models
from batchjax.cache.kv_state import init_kv_state
from batchjax.config import ModelConfig
from batchjax.forward_pass import forward
from batchjax.types import Segments, StepInputs
from batchjax.weights import Model

GOLDENS = pathlib.Path(__file__).parents[1] / "goldens"
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3")
PAGE_SIZE, NUM_PAGES = 4, 64
SHARED_LEN = 9  # tokens that all rows of a golden begin with


@dataclasses.dataclass
class Node:
  """KV of a range of positions on pages of its own, behind that of its parent."""

  start: int
  pages: np.ndarray
  parent: "Node | None" = None
  kv_len: int = 0

  def path(self) -> list["Node"]:
    return [*(self.parent.path() if self.parent else ()), self]


def pack(work: Iterable[tuple[Node, np.ndarray]], num_tokens: int) -> StepInputs:
  """A step that appends tokens to nodes (in depth-first order), padded to one shape."""
  tokens = np.full(num_tokens, -1, np.int32)
  positions, write_slots = tokens.copy(), tokens.copy()
  ranges, nodes, end = {}, {}, 0
  for node, new in work:
    here = slice(end, end + len(new))
    offset = node.kv_len + np.arange(len(new))
    tokens[here], positions[here] = new, node.start + offset
    write_slots[here] = node.pages[offset // PAGE_SIZE] * PAGE_SIZE + offset % PAGE_SIZE
    node.kv_len += len(new)
    for above in node.path():
      first, last = ranges.get(id(above), (end, end))
      assert last == end, "the tokens below a node must be contiguous"
      ranges[id(above)], nodes[id(above)] = (first, here.stop), above
    end = here.stop
  segments = np.zeros((len(Segments._fields), 8), np.int32)
  page_indices = np.zeros(64, np.int32)
  num_indices = 0
  for i, (key, (first, last)) in enumerate(ranges.items()):
    node = nodes[key]
    segments[:, i] = first, last - first, node.start, node.kv_len, num_indices
    page_indices[num_indices:num_indices + len(node.pages)] = node.pages
    num_indices += len(node.pages)
  return StepInputs(
      tokens=tokens, positions=positions, token_slots=None, write_slots=write_slots,
      segments=Segments(*segments), page_indices=page_indices, sample_tokens=None, slots=None,
      own_segments=None, is_first=None, stop_states=None, num_generated=None, sampling=None)


def new_rows(num_rows: int, row_len: int, parent: Node | None = None, start: int = 0) -> list[Node]:
  """Nodes for rows of `row_len` tokens on scattered pages."""
  pages = np.random.default_rng(0).permutation(np.arange(16, NUM_PAGES))
  width = -(-row_len // PAGE_SIZE)
  return [Node(start, pages[i * width:(i + 1) * width], parent) for i in range(num_rows)]


class Runner:
  """Runs steps on a pool that starts out full of NaN and keeps the logits of every step."""

  def __init__(self, config: ModelConfig, params):
    model = models.Transformer(config, PAGE_SIZE)

    def step(params, inputs, kv):
      hidden, kv = model.apply({"params": params}, inputs, kv)
      return model.apply({"params": params}, hidden, method="logits"), kv

    self.config, self.params = config, params
    self.step = jax.jit(step, donate_argnums=2)
    self.kv = None

  def start(self) -> None:
    self.kv = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan),
                           init_kv_state(self.config, NUM_PAGES, PAGE_SIZE))

  def __call__(self, work, num_tokens: int) -> np.ndarray:
    logits, self.kv = self.step(self.params, pack(work, num_tokens), self.kv)
    assert np.isfinite(logits).all()  # of padding too
    return np.asarray(logits)


def load_golden(family: str) -> tuple[ModelConfig, dict]:
  """Config and parameters, filled tensor by tensor through the name map."""
  config = models.config_from_hf(json.loads((GOLDENS / family / "config.json").read_text()))
  shapes = nn.unbox(jax.eval_shape(lambda: models.init_params(config, jax.random.key(0))))
  params = jax.tree.map(lambda x: np.full(x.shape, np.nan, x.dtype), shapes)
  tensors = safetensors.numpy.load_file(GOLDENS / family / "model.safetensors")
  names = models.name_map(config)
  assert set(tensors) == set(names)
  for name, target in names.items():
    parameter = params
    for key in target.path:
      parameter = parameter[key]
    target.part_of(parameter)[...] = target.arrange(tensors[name])
  return config, params


@pytest.fixture(scope="module", params=FAMILIES)
def golden(request):
  config, params = load_golden(request.param)
  with np.load(GOLDENS / request.param / "logits.npz") as arrays:
    return Runner(config, params), arrays["tokens"], arrays["logits"]


def in_one_piece(run, tokens):
  rows = new_rows(*tokens.shape)
  return run(zip(rows, tokens), 80)[:tokens.size].reshape(*tokens.shape, -1)


def in_chunks(run, tokens):
  rows = new_rows(*tokens.shape)
  pieces = []
  for start, stop in ((0, 10), (10, 11), (11, 24)):
    chunk = tokens[:, start:stop]
    pieces.append(run(zip(rows, chunk), 80)[:chunk.size].reshape(*chunk.shape, -1))
  return np.concatenate(pieces, axis=1)


def with_shared_prefix(run, tokens, num_steps=2):
  num_rows, row_len = tokens.shape
  prefix = Node(0, np.arange(3))
  rows = new_rows(num_rows, row_len - SHARED_LEN, prefix, SHARED_LEN)
  work = [(prefix, tokens[0, :SHARED_LEN]), *zip(rows, tokens[:, SHARED_LEN:])]
  if num_steps == 1:
    logits = run(work, 80)
    shared, own = logits[:SHARED_LEN], logits[SHARED_LEN:]
  else:
    shared, own = run(work[:1], 80)[:SHARED_LEN], run(work[1:], 80)
  own = own[:tokens[:, SHARED_LEN:].size].reshape(num_rows, row_len - SHARED_LEN, -1)
  return np.concatenate([np.broadcast_to(shared, (num_rows, *shared.shape)), own], axis=1)


def with_shared_prefix_in_one_step(run, tokens):
  return with_shared_prefix(run, tokens, num_steps=1)


def token_by_token(run, tokens):
  rows = new_rows(*tokens.shape)
  columns = [run(zip(rows, tokens[:, i:i + 1]), 4)[:len(rows)] for i in range(tokens.shape[1])]
  return np.stack(columns, axis=1)


@pytest.mark.parametrize("way", [in_one_piece, in_chunks, with_shared_prefix,
                                 with_shared_prefix_in_one_step, token_by_token])
def test_logits_match_transformers(golden, way):
  run, tokens, expected = golden
  run.start()
  np.testing.assert_allclose(way(run, tokens), expected, rtol=0, atol=1e-4)


def test_whole_sequences_match_transformers_and_the_engine(golden):
  run, tokens, expected = golden
  outputs = forward(Model(run.config, {"params": run.params}), tokens)
  np.testing.assert_allclose(outputs.logits, expected, rtol=0, atol=1e-4)
  run.start()
  np.testing.assert_allclose(outputs.logits, in_one_piece(run, tokens), rtol=0, atol=1e-5)


def test_a_million_positions_in_nothing_leaks(golden):
  run, tokens, _ = golden
  run.start()
  rows = new_rows(*tokens.shape, start=1_000_000)
  logits = run(zip(rows, tokens), 80)
  alone = new_rows(*tokens.shape, start=1_000_000)[1:2]
  run.start()
  np.testing.assert_allclose(run(zip(alone, tokens[1:2]), 80)[:24], logits[24:48], atol=1e-4)
  used = np.isin(np.arange(NUM_PAGES), alone[0].pages)
  for pages in run.kv.pages:
    assert np.isfinite(np.asarray(pages)[used]).all()
    assert np.isnan(np.asarray(pages)[~used]).all()


@pytest.mark.parametrize("shape", [name for name in models.SHAPES if name.startswith("tiny")])
def test_every_parameter_names_its_axes(shape):
  boxed = jax.eval_shape(lambda: models.init_params(models.SHAPES[shape], jax.random.key(0)))
  leaves = jax.tree.leaves(boxed, is_leaf=lambda x: isinstance(x, nn.LogicallyPartitioned))
  for leaf in leaves:
    assert isinstance(leaf, nn.LogicallyPartitioned)
    assert len(leaf.names) == leaf.value.ndim and None not in leaf.names


def test_parameter_tree():
  config = dataclasses.replace(models.SHAPES["tiny_gemma3"], num_layers=1, layer_kinds=("global",),
                               qkv_bias=True, tie_embeddings=False)
  tree = nn.unbox(jax.eval_shape(lambda: models.init_params(config, jax.random.key(0))))
  shapes = {"/".join(str(k.key) for k in path): x.shape
            for path, x in jax.tree_util.tree_leaves_with_path(tree)}
  assert shapes == {
      "embed/embedding": (256, 32), "lm_head/kernel": (256, 32), "final_norm/scale": (32,),
      "layers_0/attn_norm/scale": (32,), "layers_0/post_attn_norm/scale": (32,),
      "layers_0/ffn_norm/scale": (32,), "layers_0/post_ffn_norm/scale": (32,),
      "layers_0/attn/qkv": (32, 2 * 4 * 8), "layers_0/attn/qkv_bias": (2, 4, 8),
      "layers_0/attn/q_norm/scale": (8,), "layers_0/attn/k_norm/scale": (8,),
      "layers_0/attn/out": (2, 2, 8, 32),
      "layers_0/ffn/gate_up": (32, 2 * 64), "layers_0/ffn/down": (64, 32)}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_dtypes(dtype):
  config = dataclasses.replace(models.SHAPES["tiny_gemma2"], dtype=dtype)
  model = models.Transformer(config, PAGE_SIZE)
  inputs = pack(zip(new_rows(1, 6), np.arange(6)[None]), 8)

  def step(inputs):
    variables = {"params": models.init_params(config, jax.random.key(0))}
    hidden, kv = model.apply(variables, inputs, init_kv_state(config, NUM_PAGES, PAGE_SIZE))
    return variables, hidden, kv, model.apply(variables, hidden[:2], method="logits")

  variables, hidden, kv, logits = jax.eval_shape(step, inputs)
  assert {x.dtype.name for x in jax.tree.leaves((variables, hidden, kv))} == {dtype}
  assert hidden.shape == (8, 32)
  assert logits.shape == (2, config.vocab_size) and logits.dtype == jnp.float32


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_products_of_a_float32_model_are_done_in_float32(dtype):
  config = dataclasses.replace(models.SHAPES["tiny_llama"], dtype=dtype)
  model = models.Transformer(config, PAGE_SIZE)
  inputs = pack(zip(new_rows(1, 6), np.arange(6)[None]), 8)

  def step(params, inputs, kv):
    hidden, _ = model.apply(params, inputs, kv)
    return model.apply(params, hidden, method="logits")

  params, kv = jax.eval_shape(lambda: ({"params": models.init_params(config, jax.random.key(0))},
                                       init_kv_state(config, NUM_PAGES, PAGE_SIZE)))
  text = jax.jit(step).lower(params, inputs, kv).as_text()
  products = [line for line in text.splitlines() if "stablehlo.dot_general" in line]
  assert len(products) > 4 * config.num_layers
  exact = ["precision = [HIGHEST, HIGHEST]" in line for line in products]
  assert all(exact) if dtype == "float32" else not any(exact)


def test_boxed_parameters_work_like_unboxed_ones():
  config = models.SHAPES["tiny_gemma2"]
  boxed = jax.tree.map(lambda x: np.random.default_rng(0).normal(size=x.shape).astype(x.dtype),
                       jax.eval_shape(lambda: models.init_params(config, jax.random.key(0))))
  model = models.Transformer(config, PAGE_SIZE)
  logits = lambda params: model.apply({"params": params}, jnp.ones((2, 32)), method="logits")
  np.testing.assert_array_equal(logits(boxed), logits(nn.unbox(boxed)))
  assert np.abs(logits(boxed)).max() <= config.final_soft_cap
  kv = init_kv_state(config, NUM_PAGES, PAGE_SIZE)
  inputs = pack(zip(new_rows(1, 6), np.arange(6)[None]), 8)
  hidden = lambda params: jax.eval_shape(
      lambda params, inputs: model.apply({"params": params}, inputs, kv)[0], params, inputs)
  assert hidden(boxed) == hidden(nn.unbox(boxed))


def test_a_step_neither_moves_the_weights_nor_the_pool():
  config = models.SHAPES["tiny_llama"]
  params, kv = nn.unbox(jax.eval_shape(
      lambda: (models.init_params(config, jax.random.key(0)),
               init_kv_state(config, NUM_PAGES, PAGE_SIZE))))
  inputs = pack(zip(new_rows(3, 24), np.ones((3, 24), np.int32)), 80)
  compiled = Runner(config, params).step.lower(params, inputs, kv).compile()
  pool_bytes = sum(x.size * x.dtype.itemsize for x in kv.pages)
  assert compiled.memory_analysis().alias_size_in_bytes == pool_bytes
  weights = {x.size for x in jax.tree.leaves(params) if x.ndim > 1}
  for line in compiled.as_text().splitlines():
    if (" copy(" in line or " transpose(" in line) and "shared_prefix_attention/" not in line:
      shape = [int(d) for d in line.split("[", 1)[1].split("]", 1)[0].split(",") if d]
      assert np.prod(shape) not in weights and shape != list(kv.pages[0].shape), line


def test_an_unknown_attention_is_refused():
  config = models.SHAPES["tiny_llama"]
  model = models.Transformer(config, PAGE_SIZE, attention="none_such")
  params = jax.eval_shape(lambda: models.init_params(config, jax.random.key(0)))
  inputs = pack(zip(new_rows(1, 6), np.arange(6)[None]), 8)
  with pytest.raises(NotImplementedError, match="none_such"):
    jax.eval_shape(lambda params, inputs: model.apply(
        {"params": params}, inputs, init_kv_state(config, NUM_PAGES, PAGE_SIZE)), params, inputs)
