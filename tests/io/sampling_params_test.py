"""SamplingParams checks itself; the message begins with the field's name."""

import reprlib

import numpy as np
import pytest

from batchjax.types import SamplingParams

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize("field, values", [
    ("temperature", [-0.1, NAN, INF, -INF, True, "1", None, 10**400, 1e39]),
    ("top_p", [0, 0.0, -1, 1.01, NAN, False]),
    ("min_p", [-0.1, 1.1, NAN, None]),
    ("top_k", [0, -2, 1.0, True, 2**31, None]),
    ("n", [0, -1, True, 1.0, 2**31]),
    ("seed", [-1, 2**32, 1.5, False]),
    ("max_tokens", [0, -1, 10.0, True, None]),
    ("min_tokens", [-1, True, 257]),
    ("stop", ["x", ["x"], ("",), (1,)]),
    ("stop_token_ids", [[1], (-1,), (True,), (2**31,), 5]),
    ("ignore_eos", [0, 1, None]),
    ("presence_penalty", [-2.1, 2.1, NAN]),
    ("frequency_penalty", [-2.1, 2.1, NAN]),
    ("repetition_penalty", [0, -1, INF]),
    ("logit_bias", [{1: 2.0}, ((1, 2.0), (1, 3.0)), ((1, 101),), ((-1, 0),), ((1,),), ((1, NAN),)]),
    ("logprobs", [1, None]),
    ("top_logprobs", [-1, 3, True, 1.0]),  # 3 without logprobs
    ("prompt_logprobs", [1]),
    ("prompt_logprobs_start", [-1, True, 1.0, 2**31]),
])
def test_bad_values_name_their_field(field, values):
  for value in values:
    with pytest.raises(ValueError, match=f"^{field} must be ") as e:
      SamplingParams(**{field: value})
    assert reprlib.repr(value) in str(e.value)  # long ones are cut short


@pytest.mark.parametrize("given", [
    {"temperature": 0}, {"temperature": 5.5}, {"top_k": 1}, {"top_k": -1}, {"top_p": 1e-6},
    {"seed": 2**32 - 1}, {"seed": np.uint32(7)}, {"min_tokens": 256}, {"stop": ("\n", "END")},
    {"logit_bias": ((0, -100), (1, 100))}, {"logprobs": True, "top_logprobs": 20},
    {"prompt_logprobs": True, "top_logprobs": 1}, {"temperature": np.float32(0.5)},
])
def test_good_values_stay(given):
  params = SamplingParams(**given)
  assert {name: getattr(params, name) for name in given} == given
  assert hash(params) == hash(SamplingParams(**given))


def test_floats_have_one_spelling():
  assert type(SamplingParams(temperature=0).temperature) is float
