import dataclasses
import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from scipy import stats

from batchjax.engine import draw as draw_lib
from batchjax.engine import pack as pack_lib
from batchjax.engine import sampling
from batchjax.config import MeshConfig
from batchjax.engine.pack import pack_admissions
from batchjax.engine.sampling_inputs import IN_PROMPT, MAX_COUNT, pack_sampling, SamplingFeatures
from batchjax.plan.batch import Admission
from batchjax.sharding import make_mesh, Split
from batchjax.types import SamplingParams

EOS = (1,)


@functools.partial(jax.jit, static_argnames="features")
def run_sample(logits, inputs, positions, num_generated, features, penalties=None):
  return sampling.sample(logits, inputs, positions, num_generated, features, penalties,
                         jnp.arange(len(positions)))


def draw(logits, params, **kwargs):
  """The tokens of `sample_rows`, all of which can be drawn."""
  tokens, is_finite = sample_rows(logits, params, **kwargs)
  assert is_finite.all()
  return tokens


def sample_rows(logits, params, *, positions=0, num_generated=0, sample_indices=0, features=None,
         penalties=None):
  """What rows that share or have their own params draw, with the features they need."""
  num_rows = len(logits)
  params = [params] * num_rows if isinstance(params, SamplingParams) else params
  features = features or SamplingFeatures.of(params, EOS)
  indices = np.broadcast_to(sample_indices, num_rows)
  inputs = pack_sampling(params, indices, features, EOS, None, num_rows)
  as_rows = lambda x: jnp.asarray(np.broadcast_to(np.int32(x), num_rows))
  return jax.tree.map(np.asarray, run_sample(
      jnp.asarray(logits, jnp.float32), inputs, as_rows(positions), as_rows(num_generated), features,
      penalties))


run_admit = jax.jit(sampling.admit)


def admission(slot, prompt, output):
  return Admission(slot, "", SamplingParams(), 0, np.array(prompt, np.int32), np.array(output, np.int32))


def adjusted_ref(logits, params, prompt, output):
  """Steps 1 to 4 in float64, one row, in loops."""
  logits = np.array(logits, np.float64)
  for token, bias in params.logit_bias:
    logits[token] += bias
  for token in set(prompt) | set(output):
    scale = params.repetition_penalty
    logits[token] = logits[token] / scale if logits[token] > 0 else logits[token] * scale
  for token in set(output):
    logits[token] -= params.frequency_penalty * output.count(token) + params.presence_penalty
  if len(output) < params.min_tokens:
    logits[[*EOS, *params.stop_token_ids]] = -np.inf
  return logits


def kept_ref(logits, params):
  """Probabilities after truncation by a sort in float64, and how near a token came to the edge."""
  weights = np.exp((logits - logits.max()) / params.temperature)
  margin = np.abs(weights - params.min_p)[weights < 1].min(initial=1) if params.min_p else 1
  weights = np.where(weights >= np.float32(params.min_p), weights, 0)
  if params.top_k > 0:
    kth = np.sort(weights)[::-1][min(params.top_k, len(weights)) - 1]
    weights = np.where(weights >= kth, weights, 0)
  mass_above = np.array([weights[weights > w].sum() for w in weights]) / weights.sum()
  if params.top_p < 1:
    edges = np.abs(mass_above - params.top_p)[mass_above > 0]
    margin = min(margin, edges.min(initial=1))
    weights = np.where((mass_above < params.top_p) | (mass_above == 0), weights, 0)
  return weights / weights.sum(), margin


def test_greedy_takes_the_lowest_id_among_equals():
  rng = np.random.default_rng(0)
  for vocab_size in (1, 5, 16, 17, 100, 257):
    logits = rng.integers(0, 3, (40, vocab_size))
    tokens = draw(logits, SamplingParams(temperature=0.0, ignore_eos=True))
    np.testing.assert_array_equal(tokens, logits.argmax(axis=1))


def test_greedy_and_random_rows_mix():
  logits = np.random.default_rng(1).normal(size=(30, 50))
  greedy, random = SamplingParams(temperature=0.0), SamplingParams(temperature=5.0, top_p=0.99)
  tokens = draw(logits, [greedy, random] * 15, positions=np.arange(30))
  np.testing.assert_array_equal(tokens[::2], logits[::2].argmax(axis=1))
  alone = draw(logits[1::2], random, positions=np.arange(1, 30, 2))
  np.testing.assert_array_equal(tokens[1::2], alone)
  assert (tokens[1::2] != logits[1::2].argmax(axis=1)).any()


TRUNCATIONS = [
  SamplingParams(), SamplingParams(temperature=0.3), SamplingParams(top_k=1),
  SamplingParams(top_k=7), SamplingParams(top_k=500), SamplingParams(top_k=2000),
  SamplingParams(top_p=0.9), SamplingParams(top_p=0.3), SamplingParams(top_p=1e-6),
  SamplingParams(min_p=0.1), SamplingParams(min_p=1.0), SamplingParams(top_k=9, top_p=0.6),
  SamplingParams(temperature=1.7, top_k=12, top_p=0.8, min_p=0.05)]


@pytest.mark.parametrize("params", TRUNCATIONS, ids=[str(i) for i in range(len(TRUNCATIONS))])
def test_draws_are_distributed_as_the_truncated_model(params):
  vocab_size = 300
  logits = np.random.default_rng(vocab_size).normal(size=vocab_size).astype(np.float32) * 2
  probs, margin = kept_ref(np.float64(logits), params)
  assert margin > 1e-6
  num_draws = 4096
  tokens = np.concatenate([
    draw(np.tile(logits, (1024, 1)), params, positions=1024 * i + np.arange(1024))
    for i in range(num_draws // 1024)])
  counts = np.bincount(tokens, minlength=vocab_size)
  assert counts[probs == 0].sum() == 0
  if (probs > 0).sum() == 1:
    return
  # Tokens expected less than 5 times share one cell, as the test's approximation wants.
  rare = probs * num_draws < 5
  observed = np.append(counts[~rare], counts[rare].sum())
  expected = np.append(probs[~rare], probs[rare].sum()) * num_draws
  used = expected > 0
  assert stats.chisquare(observed[used], expected[used]).pvalue > 1e-3


@given(st.data())
@settings(max_examples=25, deadline=None, derandomize=True, phases=[Phase.explicit, Phase.generate])
def test_combinations_stay_inside_what_is_kept(data):
  vocab_size = 45
  rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
  # Steps of 1/4 make many ties, as logits of low precision do.
  logits = np.round(rng.normal(size=(8, vocab_size)) * 12) / 4
  token = st.integers(0, vocab_size - 1)
  rows, adjusted, prompts, outputs = [], [], [], []
  for row in logits:
    params = SamplingParams(
      temperature=data.draw(st.sampled_from([0.0, 0.5, 1.0, 2.0])),
      top_k=data.draw(st.sampled_from([-1, 1, 3, 20, 44, 45, 60])),
      top_p=data.draw(st.sampled_from([1e-6, 0.2, 0.7, 0.95, 1.0])),
      min_p=data.draw(st.sampled_from([0.0, 0.03, 0.4])),
      min_tokens=data.draw(st.integers(0, 4)), stop_token_ids=(5, 6),
      presence_penalty=data.draw(st.sampled_from([0.0, -0.5, 1.0])),
      frequency_penalty=data.draw(st.sampled_from([0.0, 0.25])),
      repetition_penalty=data.draw(st.sampled_from([1.0, 2.0])),
      logit_bias=tuple(data.draw(st.dictionaries(token, st.sampled_from([-100.0, 2.0]),
                                                 max_size=3)).items()),
      seed=data.draw(st.integers(0, 2**32 - 1)))
    rows.append(params)
    prompts.append(data.draw(st.lists(token, min_size=1, max_size=6)))
    outputs.append(data.draw(st.lists(token, max_size=6)))
    adjusted.append(adjusted_ref(row, params, prompts[-1], outputs[-1]))
  features = SamplingFeatures(
    greedy_only=False, any_greedy=True, max_top_k=64, top_p=True, min_p=True, penalties=True,
    num_bias=4, min_tokens=True, num_stop_ids=4)
  state = sampling.PenaltyState.create(8, vocab_size, features)
  for known in pack_admissions([admission(slot, prompts[slot], outputs[slot]) for slot in range(8)], 8):
    state = run_admit(state, *known)
  tokens = draw(logits, rows, num_generated=[len(o) for o in outputs], features=features,
                penalties=state)
  for i, params in enumerate(rows):
    if params.temperature == 0:
      assert tokens[i] == adjusted[i].argmax()
      continue
    probs, margin = kept_ref(adjusted[i], params)
    if margin > 1e-5:
      assert probs[tokens[i]] > 0


def test_rows_are_independent_bit_for_bit():
  rng = np.random.default_rng(7)
  cycle = list(itertools.islice(itertools.cycle(TRUNCATIONS), 24))
  logits = (rng.normal(size=(24, 515)) * 3).astype(np.float32)
  rows = [dataclasses.replace(p, seed=i) for i, p in enumerate(cycle)]
  features = SamplingFeatures.of(rows, EOS)
  positions = np.arange(24) + 100
  together = draw(logits, rows, positions=positions, features=features)
  logprobs = run_logprobs(logits, together, 3)
  orders = [rng.permutation(24), rng.permutation(24)[:7], *np.arange(24)[:, None]]
  for order in orders:
    picked = draw(logits[order], [rows[i] for i in order], positions=positions[order],
                  features=features)
    np.testing.assert_array_equal(picked, together[order])
    for got, want in zip(run_logprobs(logits[order], picked, 3), logprobs):
      np.testing.assert_array_equal(np.asarray(got), np.asarray(want)[order])


def test_sums_are_independent_of_the_number_of_rows():
  # Text alone would hide a difference in the last bit.
  weights = np.random.default_rng(3).exponential(size=(33, 1001)).astype(np.float32)
  total = jax.jit(lambda x: draw_lib.sum_tree(jnp.where(x >= 0.1, x, 0.0))[1])
  together = np.asarray(total(weights))
  for size in (1, 2, 3, 8, 32):
    np.testing.assert_array_equal(np.asarray(total(weights[:size])), together[:size])
  np.testing.assert_allclose(together, np.where(weights >= 0.1, weights, 0).sum(1), rtol=1e-6)


@pytest.mark.parametrize("num_devices", [3, 8])
def test_draws_and_sums_are_independent_of_the_number_of_devices(num_devices):
  """Bit for bit, each device having its places of the same logits and penalty counts."""
  vocab_size, num_rows = 515, len(TRUNCATIONS) + 2
  rng = np.random.default_rng(7)
  logits = (np.round(rng.normal(size=(num_rows, vocab_size)) * 48) / 16).astype(np.float32)  # ties
  logits[-1, 7] = np.nan
  rows = [dataclasses.replace(p, seed=i, presence_penalty=i % 2, logit_bias=((i, 2.0), (500, -1.0)))
          for i, p in enumerate([*TRUNCATIONS, SamplingParams(temperature=0.0), SamplingParams()])]
  features = SamplingFeatures.of(rows, EOS)
  inputs = pack_sampling(rows, [0] * num_rows, features, EOS, None, num_rows)
  positions = jnp.arange(num_rows) + 100
  prompt = rng.integers(0, vocab_size, (num_rows, 6))
  known = list(pack_admissions([admission(i, prompt[i], prompt[i]) for i in range(num_rows)], num_rows))

  def run(logits, split):
    state = sampling.PenaltyState.create(num_rows, logits.shape[1], features)
    for arrays in known:
      state = sampling.admit(state, *arrays, split)
    state = sampling.count(state, jnp.arange(num_rows), jnp.asarray(prompt[:, 0]), split)
    tokens, is_finite = sampling.sample(logits, inputs, positions, positions, features, state,
                                        jnp.arange(num_rows), split)
    return tokens, is_finite, *sampling.token_logprobs(logits, tokens, 20, split)

  split, spec = Split(num_devices, vocab_size), jax.sharding.PartitionSpec
  num_places = split.num_segments * -(-vocab_size // 48)
  ids = np.concatenate([split.token_ids(np.arange(num_places), i) for i in range(num_devices)])
  places = np.where(ids < vocab_size, logits[:, np.minimum(ids, vocab_size - 1)], -np.inf)
  lowered = jax.jit(jax.shard_map(
      functools.partial(run, split=split), mesh=make_mesh(MeshConfig(num_devices)),
      in_specs=spec(None, "tensor"), out_specs=spec(), check_vma=False)).lower(places)
  gathered = re.findall(r'stablehlo.all_gather".*-> tensor<\d+x(\d+)x', lowered.as_text())
  assert 4 < len(gathered) and max(map(int, gathered)) < vocab_size / 2, "sums and candidates only"
  got = lowered.compile()(places)
  for mine, want in zip(got, jax.jit(functools.partial(run, split=Split()))(logits), strict=True):
    np.testing.assert_array_equal(np.asarray(mine)[:-1], np.asarray(want)[:-1])
  assert np.asarray(got[1]).tolist() == [True] * (num_rows - 1) + [False]


def test_draws_depend_on_seed_sample_index_and_position():
  logits = np.zeros((512, 1000))
  base = draw(logits, SamplingParams(), positions=np.arange(512))
  np.testing.assert_array_equal(base, draw(logits, SamplingParams(), positions=np.arange(512)))
  others = [
    draw(logits, SamplingParams(seed=1), positions=np.arange(512)),
    draw(logits, SamplingParams(), positions=np.arange(512), sample_indices=1),
    draw(logits, SamplingParams(), positions=np.arange(512) + 512),
    draw(logits, SamplingParams(), sample_indices=np.arange(512))]
  for a, b in itertools.combinations([base, *others], 2):
    # Independent draws agree in 1 of 1000; 8 of 512 has a chance below 1e-7.
    assert (a == b).sum() < 8


def test_num_generated_and_features_do_not_change_a_draw():
  logits = np.random.default_rng(4).normal(size=(64, 90))
  everything = SamplingFeatures(greedy_only=False, any_greedy=True, max_top_k=16, top_p=True,
                                min_p=True, num_bias=2, min_tokens=True, num_stop_ids=4)
  lean = draw(logits, SamplingParams(), positions=np.arange(64))
  full = draw(logits, SamplingParams(), positions=np.arange(64), num_generated=5,
              features=everything)
  np.testing.assert_array_equal(lean, full)


@pytest.mark.parametrize("params", [
  SamplingParams(temperature=0.0), SamplingParams(), SamplingParams(temperature=1e-6),
  SamplingParams(temperature=1e-36),
  SamplingParams(temperature=100.0, top_p=0.5), SamplingParams(top_k=3, min_p=0.5, top_p=0.9)])
def test_extreme_logits(params):
  vocab_size = 70
  one_left = np.full(vocab_size, -np.inf)
  one_left[69] = -1e30
  huge = np.full(vocab_size, -3e38)
  huge[50] = 3e38
  logits = np.tile(np.stack([one_left, huge]), (16, 1))
  features = SamplingFeatures(greedy_only=False, any_greedy=True, max_top_k=16, top_p=True,
                              min_p=True, num_stop_ids=1)
  tokens = draw(logits, params, positions=np.arange(32), features=features)
  np.testing.assert_array_equal(tokens, [69, 50] * 16)


PENALIZED = SamplingParams(temperature=0.0, repetition_penalty=1.3, frequency_penalty=0.5,
                           logit_bias=((0, 3.0), (40, -100.0)))


@pytest.mark.parametrize("params", [
  SamplingParams(temperature=0.0), SamplingParams(), SamplingParams(temperature=1e-36, top_p=0.5),
  SamplingParams(top_k=3), SamplingParams(top_k=2000, min_p=0.5), PENALIZED])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_logits_that_are_not_finite_are_told_row_by_row(params, dtype):
  vocab_size = 70
  rng = np.random.default_rng(0)
  logits = rng.normal(size=(9, vocab_size))
  logits[1:] *= 1e30
  logits[1, 5:] = -np.inf  # a masked vocabulary is no fault
  logits[2] = np.nan
  logits[3, 69] = np.nan
  logits[4, 0] = -np.nan
  logits[5, 33] = np.inf
  logits[6] = -np.inf
  logits[7, ::2], logits[7, 1] = -np.inf, np.nan
  want = [True, True, False, False, False, False, False, False, True]
  features = SamplingFeatures.of([params], EOS)
  state = sampling.PenaltyState.create(9, vocab_size, features)
  # Mixed with other rows or alone: the same answer, and a token of the vocabulary all the same.
  logits = jnp.asarray(logits, dtype)
  tokens, is_finite = sample_rows(logits, params, penalties=state)
  np.testing.assert_array_equal(is_finite, want)
  assert ((tokens >= 0) & (tokens < vocab_size)).all()
  both = [params, SamplingParams(temperature=0.0)] * 9
  both_state = sampling.PenaltyState.create(18, vocab_size, SamplingFeatures.of(both, EOS))
  mixed, is_finite = sample_rows(logits.repeat(2, axis=0), both, penalties=both_state)
  np.testing.assert_array_equal(is_finite, np.repeat(want, 2))
  np.testing.assert_array_equal(mixed[::2][want], tokens[want])
  logprobs, _, top = run_logprobs(logits, np.zeros(9, np.int32), 2)
  np.testing.assert_array_equal(np.isnan(logprobs), ~np.array(want))
  np.testing.assert_array_equal(np.isnan(top).any(axis=1), ~np.array(want))


def test_nan_of_a_masked_stop_token_is_told_too():
  logits = np.zeros((4, 20))
  logits[1, 1], logits[2, 7], logits[3, 1] = np.nan, np.inf, -np.inf  # 1 is the end token
  params = SamplingParams(min_tokens=3, stop_token_ids=(7, 7))
  tokens, is_finite = sample_rows(logits, params)
  np.testing.assert_array_equal(is_finite, [True, False, False, True])
  assert not set(tokens[is_finite]) & {1, 7}


def test_telling_costs_no_pass_over_the_vocabulary():
  """The largest logit is computed once for the draw; nothing else reduces over the vocabulary."""
  shape = jax.ShapeDtypeStruct((8, 1000), jnp.float32)
  rows = jax.ShapeDtypeStruct((8,), jnp.int32)
  for params, num_maxima in ((SamplingParams(temperature=0.0), 1), (SamplingParams(), 1)):
    features = SamplingFeatures.of([params], EOS)
    inputs = pack_sampling([params] * 8, [0] * 8, features, EOS, None, 8)
    text = run_sample.lower(shape, inputs, rows, rows, features).as_text()
    reductions = [line for line in text.splitlines() if "stablehlo.reduce(" in line
                  and ("tensor<8x1000x" in line or "tensor<8x96xf32>" in line)]
    assert sum("maximum" in line for line in reductions) == num_maxima


def test_ties_of_bfloat16_logits_are_kept_together():
  logits = np.asarray(jnp.array([2.0, 1.0, 1.001, 1.002, 0.0], jnp.bfloat16), np.float32)
  assert logits[1] == logits[2] == logits[3]
  for params in (SamplingParams(top_k=2), SamplingParams(top_p=0.6)):
    tokens = draw(np.tile(logits, (200, 1)), params, positions=np.arange(200))
    assert set(tokens) == {0, 1, 2, 3}


@pytest.mark.parametrize("size, k", [(5000, 3), (5000, 40), (9001, 1), (700, 50), (300, 300)])
def test_largest_finds_values_and_places(size, k):
  rng = np.random.default_rng(size + k)
  x = np.where(rng.random((3, size)) < 0.3, rng.random((3, size)), 0.0).astype(np.float32)
  x[1, :] = 0.0
  x[1, rng.integers(0, size, 2)] = 0.5  # fewer than k above zero
  x[2] = np.round(x[2], 1)  # ties
  best, places = jax.tree.map(np.asarray, jax.jit(draw_lib.largest, static_argnums=1)(x, k))
  np.testing.assert_array_equal(best, -np.sort(-x, axis=1)[:, :k])
  np.testing.assert_array_equal(np.take_along_axis(x, places, axis=1), best)
  assert all(len(set(row)) == k for row in places)


@pytest.mark.parametrize("max_k", [16, 1024, 2048])
def test_kth_largest_of_ties_and_zeros(max_k):
  weights = np.round(np.random.default_rng(0).random((9, 333)), 2).astype(np.float32)
  weights[:, 200:] = 0
  k = np.array([1, 2, 3, 5, 8, 13, 15, 16, 16]) * max_k // 16
  weights -= 0.5  # both signs
  maxima = functools.reduce(jnp.maximum, draw_lib.columns(jnp.asarray(weights)))
  got = draw_lib.kth_largest(jnp.asarray(weights), maxima, jnp.asarray(k), max_k)
  want = np.sort(weights, axis=1)[:, ::-1][np.arange(9), np.minimum(k, 333) - 1]
  np.testing.assert_array_equal(got, want)


def test_penalty_state_counts_admits_and_drops(monkeypatch):
  monkeypatch.setattr(pack_lib, "ADMITTED_TOKENS", 3)  # a row's tokens come in several parts
  assert sampling.PenaltyState.create(2, 4, SamplingFeatures()) is None
  state = sampling.PenaltyState.create(3, 6, SamplingFeatures(penalties=True))

  def admit(state, *admissions):
    for known in pack_admissions(admissions, 3):
      state = sampling.admit(state, *known)
    return state

  state = admit(state, admission(2, [1, 3], []), admission(1, [0, 4, 4, 5], [5, 5]))
  state = sampling.count(state, jnp.array([1, -1, 2, 0]), jnp.array([5, 3, 2, -1]))
  P = IN_PROMPT
  np.testing.assert_array_equal(state.seen, [[0] * 6, [P, 0, 0, 0, P, P + 3], [0, P, 1, P, 0, 0]])
  jax.tree.map(np.testing.assert_array_equal, admit(state), state)
  state = admit(state, admission(1, [2], []))
  np.testing.assert_array_equal(state.seen, [[0] * 6, [0, 0, P, 0, 0, 0], [0, P, 1, P, 0, 0]])


def test_counts_of_penalties_end_at_their_largest():
  state = sampling.PenaltyState(jnp.full((1, 2), MAX_COUNT, jnp.uint16))
  assert sampling.count(state, jnp.array([0]), jnp.array([1])).seen.tolist() == [[MAX_COUNT] * 2]
  many = admission(0, [1], [1] * (MAX_COUNT + 9))
  _, _, tokens, seen = next(pack_admissions([many], 1))
  assert (tokens[0], seen[0]) == (1, IN_PROMPT + MAX_COUNT)


def test_penalties_without_state_are_an_error():
  with pytest.raises(ValueError, match="penalty state"):
    draw(np.zeros((1, 4)), SamplingParams(frequency_penalty=1.0))


def test_finish_reasons_and_their_precedence():
  params = SamplingParams(max_tokens=5, min_tokens=2, stop_token_ids=(9,))
  features = SamplingFeatures.of([params], EOS)
  cases = [  # token, number of tokens, automaton state -> reason
    (4, 3, 0, 0), (1, 3, 0, 1), (9, 3, -1, 1), (4, 3, -1, 2), (4, 5, 0, 3), (4, 5, -1, 2),
    (9, 5, -1, 1), (9, 2, 0, 0), (4, 2, -1, 0), (-1, 3, 0, 0)]
  tokens, counts, states, want = (np.array(column) for column in zip(*cases))
  finite = np.ones(len(cases), bool)
  inputs = pack_sampling([params] * len(cases), [0] * len(cases), features, EOS, None, len(cases))
  got = sampling.finish_reasons(tokens, finite, counts, inputs, jnp.asarray(states))
  assert got.dtype == jnp.int8
  np.testing.assert_array_equal(got, want)
  without = sampling.finish_reasons(tokens, finite, counts, inputs, None)
  np.testing.assert_array_equal(without, np.where(states < 0, np.where(want == 2, np.where(
    counts >= 5, 3, 0), want), want))
  assert (sampling.finish_reasons(tokens, ~finite, counts, inputs, jnp.asarray(states)) == 4).all()


def test_advance_stop_walks_the_table():
  # The automaton that starts at 3 completes at token 2 behind token 1.
  transitions = np.zeros((5, 3), np.int16)
  transitions[3:] = [[0, 1, 0], [0, 1, -1]]
  automaton = np.array([3, 3, 3, -1, 3, 3])
  states = np.array([0, 1, 1, 0, -1, 1])
  tokens = np.array([1, 2, 0, 2, 1, -1])
  got = sampling.advance_stop(jnp.asarray(transitions), automaton, jnp.asarray(states), tokens)
  np.testing.assert_array_equal(got, [1, -1, 0, 0, 1, 1])


run_logprobs = jax.jit(sampling.token_logprobs, static_argnums=2)


def log_softmax_ref(logits):
  logits = np.float64(logits)
  highest = logits.max(axis=-1, keepdims=True)
  return logits - highest - np.log(np.exp(logits - highest).sum(axis=-1, keepdims=True))


def test_token_logprobs_are_of_the_raw_distribution():
  logits = (np.random.default_rng(2).normal(size=(6, 203)) * 8).astype(np.float32)
  tokens = np.array([0, 202, 16, 100, 5, -1])
  want = log_softmax_ref(logits)
  got, top_ids, top = run_logprobs(logits, tokens, 5)
  np.testing.assert_allclose(got[:5], want[np.arange(5), tokens[:5]], atol=2e-5)
  assert np.isnan(got[5])
  np.testing.assert_array_equal(top_ids, np.argsort(-logits, axis=1, kind="stable")[:, :5])
  np.testing.assert_allclose(top, -np.sort(-want, axis=1)[:, :5], atol=2e-5)
  assert run_logprobs(logits, tokens, 0)[1:] == (None, None)


def test_token_logprobs_of_extreme_logits():
  logits = np.array([[3e38, 0, -np.inf], [-np.inf, -np.inf, 5.0]], np.float32)
  got, _, top = run_logprobs(logits, np.array([0, 2]), 3)
  np.testing.assert_array_equal(got, [0, 0])
  assert not np.isnan(top).any()


@pytest.mark.parametrize("num_tokens", [1, 8, 21])
@pytest.mark.parametrize("num_top", [1, 2])
def test_prompt_logprobs_equal_those_computed_at_once(num_tokens, num_top):
  rng = np.random.default_rng(num_tokens)
  hidden = rng.normal(size=(num_tokens, 12)).astype(np.float32)
  head = rng.normal(size=(12, 40)).astype(np.float32)
  next_tokens = rng.integers(-1, 40, num_tokens)
  shapes = []

  def logits_fn(x):
    shapes.append(x.shape)
    return x @ head

  got, top_ids, top = sampling.prompt_logprobs(hidden, next_tokens, logits_fn, 8, num_top)
  want, null = log_softmax_ref(hidden @ head), next_tokens < 0
  np.testing.assert_allclose(got, np.where(null, np.nan, want[np.arange(num_tokens), next_tokens]),
                             atol=2e-5)
  best = np.argsort(-want, axis=1)[:, :num_top]
  np.testing.assert_array_equal(top_ids, np.where(null[:, None], -1, best))
  np.testing.assert_allclose(top, np.where(null[:, None], np.nan, np.take_along_axis(want, best, 1)),
                             atol=2e-5)
  assert all(shape == (min(8, num_tokens), 12) for shape in shapes)
  assert sampling.prompt_logprobs(hidden, next_tokens, logits_fn, 8, 0)[1] is None


def test_prompt_logprobs_compute_logits_of_scored_tokens_alone():
  blocks = []

  def logits_fn(x):
    jax.debug.callback(lambda _: blocks.append(1), x[0, 0])
    return jnp.tile(x, (1, 9))

  run = jax.jit(lambda tokens: sampling.prompt_logprobs(jnp.ones((64, 4)), tokens, logits_fn, 8, 1))
  for num_scored, num_blocks in ((0, 0), (8, 1), (17, 3), (64, 8)):
    tokens = np.full(64, -1)
    tokens[np.random.default_rng(0).permutation(64)[:num_scored]] = 3
    blocks.clear()
    scores = jax.block_until_ready(run(tokens))
    jax.effects_barrier()
    assert len(blocks) == num_blocks
    np.testing.assert_allclose(scores[0], np.where(tokens < 0, np.nan, -np.log(36)), rtol=1e-5)
