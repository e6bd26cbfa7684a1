import dataclasses

import numpy as np
import pytest

from batchjax.engine.sampling_inputs import SamplingFeatures, SamplingTable, pack_sampling
from batchjax.types import SamplingParams, StopTable

EOS = (2, 7)
STOP_TABLE = StopTable(np.zeros((2, 3, 5), np.int16), {("a",): 0, ("b", "c"): 1})
RICH = SamplingParams(
  temperature=0.5, top_k=40, top_p=0.9, min_p=0.1, seed=5, max_tokens=9, min_tokens=2,
  stop=("b", "c"), stop_token_ids=(11, 7), presence_penalty=0.1, frequency_penalty=0.2,
  repetition_penalty=1.5, logit_bias=((3, 1.5), (4, -2.0)), logprobs=True, top_logprobs=4,
  prompt_logprobs=True)
PLAIN = SamplingParams()
GREEDY = SamplingParams(temperature=0.0, ignore_eos=True)


def test_features_hold_what_is_used_and_nothing_else():
  assert SamplingFeatures.of([], EOS) == SamplingFeatures()
  assert SamplingFeatures.of([PLAIN], EOS) == SamplingFeatures(greedy_only=False, num_stop_ids=2)
  assert SamplingFeatures.of([GREEDY], EOS) == SamplingFeatures(greedy_only=True, any_greedy=True)
  assert SamplingFeatures.of([RICH], EOS) == SamplingFeatures(
    greedy_only=False, any_greedy=False, max_top_k=64, top_p=True, min_p=True, penalties=True,
    num_bias=2, min_tokens=True, num_stop_ids=4, stop_strings=True, logprobs=True,
    num_top_logprobs=4, prompt_logprobs=True)


def test_truncation_of_greedy_rows_costs_nothing():
  params = dataclasses.replace(RICH, temperature=0.0)
  assert not SamplingFeatures.of([params], EOS).truncate
  assert SamplingFeatures.of([RICH], EOS).truncate


@pytest.mark.parametrize("top_k, expected", [(-1, 0), (1, 16), (16, 16), (17, 32),
                                             (1000, 1024)])
def test_max_top_k_is_a_power_of_two(top_k, expected):
  assert SamplingFeatures.of([SamplingParams(top_k=top_k)], EOS).max_top_k == expected


def test_union_serves_both():
  rows = [PLAIN, GREEDY, RICH]
  together = SamplingFeatures.of(rows, EOS)
  plain, others = SamplingFeatures.of([PLAIN], EOS), SamplingFeatures.of([GREEDY, RICH], EOS)
  assert together == plain.union(others) == others.union(plain)
  assert not together.greedy_only and together.any_greedy and together.num_stop_ids == 4
  assert hash(together) == hash(SamplingFeatures.of(reversed(rows), EOS))


def test_pack_pads_with_harmless_rows():
  packed = pack_sampling([RICH, GREEDY], [3, 0], SamplingFeatures.of([RICH, GREEDY], EOS), EOS,
                         STOP_TABLE, num_rows=4)
  np.testing.assert_array_equal(packed.bias_ids, [[3, 4], [-1, -1], [-1, -1], [-1, -1]])
  np.testing.assert_array_equal(packed.bias_values, [[1.5, -2], [0, 0], [0, 0], [0, 0]])
  np.testing.assert_array_equal(packed.stop_ids, [[2, 7, 11, -1], [-1] * 4, [-1] * 4, [-1] * 4])
  np.testing.assert_array_equal(packed.automaton, [1, -1, -1, -1])
  np.testing.assert_array_equal(packed.sample_index, [3, 0, 0, 0])
  np.testing.assert_array_equal(packed.temperature, np.float32([0.5, 0, 0, 0]))
  np.testing.assert_array_equal(packed.repetition_penalty, np.float32([1.5, 1, 1, 1]))
  np.testing.assert_array_equal(packed.top_k, [40, -1, -1, -1])
  np.testing.assert_array_equal(packed.max_tokens, [9, 256, 1, 1])
  dtypes = {name: field.dtype for name, field in packed._asdict().items()}
  assert dtypes["seed"] == np.uint32 and dtypes["bias_values"] == np.float32
  assert dtypes["stop_ids"] == np.int32


def test_largest_seed_and_smallest_temperature_survive():
  params = SamplingParams(seed=2**32 - 1, temperature=1e-60)
  features = SamplingFeatures.of([params], EOS)
  packed = pack_sampling([params], [0], features, EOS, None, 1)
  assert packed.seed[0] == 2**32 - 1
  assert packed.temperature[0] == 0 and features.greedy_only


def test_table_replaces_rows_and_gathers_copies():
  table = SamplingTable(3, SamplingFeatures.of([RICH, PLAIN], EOS), EOS, STOP_TABLE)
  table.set(1, RICH, 4)
  before = table.gather(np.array([1, -1, 0]))
  np.testing.assert_array_equal(before.sample_index, [4, 0, 0])
  np.testing.assert_array_equal(before.automaton, [1, -1, -1])
  table.set(1, PLAIN, 0)
  assert before.sample_index[0] == 4
  after = table.gather(np.array([1]))
  features = SamplingFeatures.of([RICH, PLAIN], EOS)
  expected = pack_sampling([PLAIN], [0], features, EOS, STOP_TABLE, 1)
  for got, want in zip(after, expected):
    np.testing.assert_array_equal(got, want)


def test_what_is_asked_for_again_is_the_same_until_a_slot_changes():
  table = SamplingTable(3, SamplingFeatures.of([RICH, PLAIN], EOS), EOS, STOP_TABLE)
  table.set(1, RICH, 4)
  slots = np.array([1, -1, 0])
  before = table.gather(slots)
  assert table.gather(slots.copy()).seed is before.seed
  assert table.gather(slots[:2]).seed.shape == (2,)
  table.set(0, RICH, 2)
  np.testing.assert_array_equal(table.gather(slots).sample_index, [4, 0, 2])


def test_errors_name_the_slot_and_the_remedy():
  table = SamplingTable(2, SamplingFeatures.of([PLAIN], EOS), EOS)
  with pytest.raises(IndexError, match="slot 2"):
    table.set(2, PLAIN, 0)
  with pytest.raises(IndexError, match="slot -1"):
    table.set(-1, PLAIN, 0)
  with pytest.raises(ValueError, match="slot 0.*features of all requests"):
    table.set(0, SamplingParams(top_p=0.5), 0)
  stop = SamplingParams(stop=("z",))
  table = SamplingTable(2, SamplingFeatures.of([stop], EOS), EOS, STOP_TABLE)
  with pytest.raises(ValueError, match="slot 1.*stop table"):
    table.set(1, stop, 0)
  with pytest.raises(ValueError, match="num_rows=1"):
    pack_sampling([PLAIN, PLAIN], [0, 0], SamplingFeatures.of([PLAIN], EOS), EOS, None, 1)
