"""What is wrong with a request is said before anything runs."""

import numpy as np
import pytest

from batchjax.config import ConfigError
from batchjax.plan.requests import check_requests
from batchjax.testing.fake_model import fake_config
from batchjax.types import Request, SamplingParams, StopTable

CONFIG = fake_config(vocab_size=97, max_len=20)


def check(*prompts, stop_table=None, ids="abc", **params):
  check_requests([Request(name, prompt, SamplingParams(**{"max_tokens": 4, **params}))
                  for name, prompt in zip(ids, prompts)], CONFIG, stop_table)


@pytest.mark.parametrize("prompts, params, told", [
    ([[1], []], {}, "request 'b': the prompt has no tokens: give it at least one"),
    ([[1, -1]], {}, "request 'a': prompt token 1 is -1, but the model's vocabulary has 97 tokens"),
    ([[1, 97]], {}, "prompt token 1 is 97.*use the model's own tokenizer"),
    ([[1] * 20], {}, "the prompt has 20 tokens, which leaves no room in the context of 20"),
    ([[1] * 17], {}, "max_tokens is 4, together over the context of 20.*max_tokens to at most 3"),
    ([[1]], {"logit_bias": ((97, 1.0),)}, "logit_bias names token 97"),
    ([[1]], {"stop_token_ids": (99,)}, "stop_token_ids names token 99"),
    ([[1]], {"logprobs": True, "top_logprobs": 98}, "98 alternatives per token"),
    ([[1]], {"stop": ("x",)}, r"'a': nothing finds its stop strings \['x'\] in tokens: give tok"),
    ([[1], [2]], {"ids": "aa"}, "request 'a': an earlier request has this id: make it unique"),
])
def test_the_first_bad_request_is_named_with_its_remedy(prompts, params, told):
  with pytest.raises(ConfigError, match=told):
    check(*prompts, **params)


def test_a_stop_table_without_the_strings_of_a_later_window():
  table = StopTable(np.zeros((1, 97), np.int16), {("x",): 0})
  check([1], stop=("x",), stop_table=table)
  with pytest.raises(ConfigError, match=r"stop strings \['y'\]"):
    check([1], stop=("y",), stop_table=table)


def test_what_just_fits():
  check([1] * 16, [96], [0])
  check([1] * 20, max_tokens=0, prompt_logprobs=True)  # only scored


def test_a_prompt_is_made_of_any_sequence_of_integers():
  for given in ([3, 4], (3, 4), np.array([3, 4]), np.array([3, 4], np.uint8)):
    ids = Request("a", given).prompt_token_ids
    assert ids.dtype == np.int32 and ids.tolist() == [3, 4]
  assert Request("a", []).prompt_token_ids.dtype == np.int32
  kept = np.array([3, 4], np.int32)
  assert Request("a", kept).prompt_token_ids is kept


@pytest.mark.parametrize("given", [[1.0], [[1, 2]], 3, "text", [None], np.array([1.5]), [2**31]])
def test_what_is_no_sequence_of_integers_is_refused(given):
  with pytest.raises(ValueError, match="'a': prompt_token_ids must be a sequence of 32-bit int"):
    Request("a", given)
