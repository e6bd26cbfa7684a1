"""Every way in which a row can be right or wrong."""

import dataclasses
import sys

from hypothesis import given, settings, strategies as st
import numpy as np
import pytest

from batchjax.config import RowLimits
from batchjax.io import fields, validate
from batchjax.io.records import Record, RowError
from batchjax.types import SamplingParams

DEFAULTS = SamplingParams(temperature=0.25, max_tokens=32)
NAN = float("nan")


def parse(value, defaults=DEFAULTS, model_name="", job_seed=0):
  return validate.parse(Record(4, 6, value), defaults=defaults, model_name=model_name,
                        job_seed=job_seed)


def batch(url="/v1/chat/completions", **body):
  if "chat" in url:
    body = {"messages": [{"role": "user", "content": "hi"}]} | body
  else:
    body = {"prompt": "hi"} | body
  return {"custom_id": "c", "method": "POST", "url": url, "body": body}


def completions(**body):
  return batch("/v1/completions", **body)


def plain(**values):
  return {"id": "p", "prompt": "hi"} | values


def test_chat_row():
  tools = [{"type": "function", "function": {"name": "f"}}]
  row = parse(batch(model="m", max_completion_tokens=7, temperature=0, top_p=0.5, n=2, seed=3,
                    stop=["a", "b"], presence_penalty=1, frequency_penalty=-1,
                    logit_bias={"5": -100, "7": 1.5}, logprobs=True, top_logprobs=4, top_k=9,
                    min_p=0.1, repetition_penalty=1.2, min_tokens=1, stop_token_ids=[1, 2],
                    ignore_eos=True, tools=tools, chat_template_kwargs={"enable_thinking": False},
                    user="u", metadata={"k": 1}, stream=False, store=True), model_name="m")
  assert (row.index, row.row, row.request_id, row.form, row.model) == (4, 6, "c", "chat", "m")
  assert row.prompt == [{"role": "user", "content": "hi"}]
  assert (row.tools, row.chat_template_kwargs) == (tools, {"enable_thinking": False})
  assert row.sampling_params == SamplingParams(
      temperature=0, top_k=9, top_p=0.5, min_p=0.1, n=2, seed=3, max_tokens=7, min_tokens=1,
      stop=("a", "b"), stop_token_ids=(1, 2), ignore_eos=True, presence_penalty=1,
      frequency_penalty=-1, repetition_penalty=1.2, logit_bias=((5, -100.0), (7, 1.5)),
      logprobs=True, top_logprobs=4)


def test_completions_row():
  row = parse(completions(prompt=[1, 2, 3], logprobs=2, echo=True, stop="x",
                          return_token_ids=True))
  assert (row.form, row.echo, row.return_token_ids) == ("completions", True, True)
  assert row.prompt.dtype == np.int32 and row.prompt.tolist() == [1, 2, 3]
  params = row.sampling_params
  assert (params.logprobs, params.top_logprobs, params.prompt_logprobs) == (True, 2, True)
  assert params.stop == ("x",)


@pytest.mark.parametrize("prompt, parsed", [("a", "a"), (["a"], "a"), ([[1, 2]], [1, 2])])
def test_one_completions_prompt(prompt, parsed):
  got = parse(completions(prompt=prompt)).prompt
  assert (got if isinstance(got, str) else got.tolist()) == parsed


def test_plain_rows():
  assert parse(plain()).prompt == "hi"
  assert parse({"prompt": "hi"}).request_id == "row-6"
  assert parse({"id": 17, "prompt": "hi"}).request_id == "17"
  assert parse({"id": "p", "prompt_token_ids": [5]}).prompt.tolist() == [5]
  assert parse({"messages": [{"role": "user", "content": "q"}]}).form == "plain"
  assert parse(plain(prompt_logprobs=True)).sampling_params.prompt_logprobs


def test_absent_and_null_fields_take_the_jobs_defaults():
  for row in (parse(plain()), parse(plain(temperature=None, seed=None, messages=None)),
              parse(batch(temperature=None)), parse(completions(best_of=None))):
    assert dataclasses.replace(row.sampling_params, seed=0) == DEFAULTS


@pytest.mark.parametrize("value, defaults, want", [
    (plain(), {"logprobs": True, "top_logprobs": 3}, (True, 3, False)),
    (plain(logprobs=False), {"logprobs": True, "top_logprobs": 3}, (False, 0, False)),
    (plain(), {"prompt_logprobs": True, "top_logprobs": 3}, (False, 3, True)),
    (batch(), {"prompt_logprobs": True, "top_logprobs": 3}, (False, 0, False)),
    (batch(logprobs=True), {}, (True, 0, False)),
    (completions(), {"logprobs": True, "top_logprobs": 3}, (True, 3, False)),
    (completions(logprobs=0), {"logprobs": True, "top_logprobs": 3}, (True, 0, False)),
    (completions(echo=True), {}, (False, 0, False)),
])
def test_logprob_settings(value, defaults, want):
  params = parse(value, SamplingParams(**defaults)).sampling_params
  assert (params.logprobs, params.top_logprobs, params.prompt_logprobs) == want


def test_seed_is_a_stable_hash_of_job_seed_and_id():
  assert parse(plain(), job_seed=1).sampling_params.seed == fields.stable_seed(1, "p")
  assert parse(plain(seed=0), job_seed=1).sampling_params.seed == 0
  assert fields.stable_seed(0, "a") == 0x5a96de45  # as `printf 0:a | b2sum -l 32` says
  seeds = {fields.stable_seed(s, i) for s in range(40) for i in ("a", "b", "1:a", ":a")}
  assert len(seeds) == 160


def test_messages_are_normal():
  """`text.messages` says what that is."""
  parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b", "annotations": []}]
  function = {"name": "f", "arguments": '{"x": [null]}', "strict": None}
  row = parse(batch(messages=[
      {"role": "user", "content": parts, "name": "n", "audio": None},
      {"role": "assistant", "content": None, "tool_calls": [{"id": "1", "function": function}]},
      {"role": "tool", "tool_call_id": "1", "content": "42"}]))
  assert row.prompt == [
      {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}],
       "name": "n"},
      {"role": "assistant", "tool_calls": [
          {"id": "1", "function": {"name": "f", "arguments": {"x": [None]}}}]},
      {"role": "tool", "tool_call_id": "1", "content": "42"}]


def test_null_members_of_tools_are_absent_and_their_schema_is_as_given():
  schema = {"type": "object", "required": [], "properties": {"a": {"default": None}}}
  function = {"name": "f", "description": None, "parameters": schema}
  tools = [{"type": "function", "function": function, "strict": None}]
  assert parse(batch(tools=tools)).tools == [
      {"type": "function", "function": {"name": "f", "parameters": schema}}]


BAD = [
    # form and envelope
    ({"custom_id": "c", "url": "/v1/completions", "body": {}}, "method", "method is missing"),
    ({"custom_id": "c", "method": "POST", "body": {}}, "url", "url is missing"),
    ({"custom_id": "c", "method": "POST", "url": "/v1/completions"}, "body", "body is missing"),
    ({"method": "POST", "url": "/v1/completions", "body": {}}, "custom_id", "custom_id is missing"),
    (batch() | {"custom_id": ""}, "custom_id", 'must be a non-empty string, got ""'),
    (batch() | {"custom_id": 5}, "custom_id", "must be a non-empty string, got 5"),
    (batch() | {"method": "GET"}, "method", 'must be "POST", got "GET"'),
    (batch() | {"url": "/v1/embeddings"}, "url", "/v1/chat/completions or /v1/completions"),
    (batch() | {"url": ["x"]}, "url", "must be"),
    (batch() | {"body": "{}"}, "body", "must be an object"),
    (batch() | {"temperature": 1}, "temperature", "stands beside body: move it into body"),
    (batch() | {"extra": 1}, "extra", "a batch line has custom_id, method, url and body"),
    (plain(id=""), "id", "non-empty string"),
    (plain(id=True), "id", "must be a non-empty string, got true"),
    (plain(id=[1]), "id", "non-empty string"),
    # names
    (plain(temprature=1), "temprature", "did you mean temperature?"),
    (batch(max_token=1), "max_token", "did you mean max_tokens"),
    (completions(messages=[]), "messages", "belongs to requests of /v1/chat/completions: change"),
    (batch(prompt="x"), "prompt", "belongs to requests of /v1/completions: change the url"),
    (completions(top_logprobs=1), "top_logprobs", "requests of /v1/chat/completions"),
    (batch(question="x"), "question", "is not a field of the body of a chat request"),
    (plain(text="x"), "text", "text is a field of the output: rename it, or move it into metadata"),
    (plain(response="x"), "response", "rename it"), (plain(choices=["a"]), "choices", "rename it"),
    *((plain(**{name: 1}), name, f"did you mean {meant}?") for name, meant in (
        ("max_token", "max_tokens"), ("maxTokens", "max_tokens"), ("temprature", "temperature"),
        ("max_new_tokens", "max_tokens"), ("stop_sequences", "stop"), ("seeds", "seed"), ("topp", "top_p"),
        ("temp", "temperature"), ("message", "messages"))),
    (plain(do_sample=True), "do_sample", "do_sample is not supported: remove it"),
    (batch(response_format={"type": "json_object"}), "response_format", "not supported: remove it"),
    (batch(stream=True), "stream", "must be false"),
    (batch(stream="no"), "stream", "must be false"),
    # model
    (batch(model="other"), "model", "model is 'other', but this job runs 'm'"),
    (plain(model=5), "model", "must be a string"),
    # prompts
    ({"id": "p"}, "prompt", "no prompt or messages or prompt_token_ids: give it one"),
    (plain(messages=[{"role": "user", "content": "x"}]), "messages", "both prompt and messages"),
    (plain(prompt_token_ids=[1]), "prompt_token_ids", "both prompt and prompt_token_ids"),
    (plain(prompt=""), "prompt", "prompt is empty"),
    (plain(prompt=[""]), "prompt", "prompt is empty"),
    (plain(prompt=[]), "prompt", "prompt is empty"),
    (plain(prompt=[[]]), "prompt", "prompt is empty"),
    (plain(prompt=5), "prompt", "a string or a list of token ids"),
    (plain(prompt={"a": 1}), "prompt", "a string or a list of token ids"),
    (completions(prompt=["a", "b", "c"]), "prompt", "list of 3 prompts: write one row for each"),
    (completions(prompt=[[1], [2]]), "prompt", "list of 2 prompts"),
    (completions(prompt=[1, -2]), "prompt[1]", "prompt[1] must be a token id"),
    (completions(prompt=[True]), "prompt[0]", "must be a token id"),
    (completions(prompt=[1.5]), "prompt[0]", "must be a token id"),
    (completions(prompt=[2**31]), "prompt[0]", "must be a token id"),
    (completions(prompt=[1, "a"]), "prompt[1]", "must be a token id"),
    ({"prompt_token_ids": "a"}, "prompt_token_ids", "must be a list of token ids"),
    ({"prompt_token_ids": []}, "prompt_token_ids", "is empty"),
    ({"prompt_token_ids": [1, None]}, "prompt_token_ids[1]", "must be a token id"),
    (batch(messages=[]), "messages", "messages is empty"),
    (batch(messages="hi"), "messages", "must be a list of objects"),
    (batch(messages=["hi"]), "messages[0]", "an object with role and content"),
    (batch(messages=[{"content": "x"}]), "messages[0].role", 'a string such as "user"'),
    (batch(messages=[{"role": "user"}]), "messages[0].content", "a string or a list of text parts"),
    (batch(messages=[{"role": "user", "content": 5}]), "messages[0].content", "got 5"),
    (batch(messages=[{"role": "user", "content": [{"type": "image_url"}]}]),
     "messages[0].content[0]", "reads text alone"),
    (batch(messages=[{"role": "user", "content": [{"type": "text"}]}]),
     "messages[0].content[0]", "an object such as"),
    *[(batch(messages=[{"role": "assistant", "tool_calls": [
        {"function": {"name": "f", "arguments": arguments}}]}]),
       "messages[0].tool_calls[0].function.arguments", "an object, or a string that holds one")
      for arguments in ("", "{", "[1]", "null", 3, [{}], '{"a": "\\ud800"}')],
    (batch(messages=[{"role": "assistant", "function_call": {"name": "f", "arguments": "x"}}]),
     "messages[0].function_call.arguments", 'got "x"'),
    (batch(messages=[{"role": "assistant", "tool_calls": [{"function": "f"}]}]),
     "messages[0].tool_calls[0].function", "an object with name and arguments"),
    (batch(messages=[{"role": "assistant", "tool_calls": 1}]), "messages[0].tool_calls", "a list"),
    (batch(tools={}), "tools", "must be a list"),
    (batch(tools=[{"type": "function"}]), "tools[0]", "an object such as"),
    (batch(chat_template_kwargs=[1]), "chat_template_kwargs", "must be an object"),
    *((batch(chat_template_kwargs={"a": 1, name: 2}), f"chat_template_kwargs.{name}",
       f"may not name {name}, which every template is given: remove it") for name in (
           "messages", "tools", "bos_token", "eos_token", "add_generation_prompt")),
    (plain(tools=[]), "tools", "tools needs messages"),
    (plain(chat_template_kwargs={"a": 1}), "chat_template_kwargs", "needs messages"),
    ({"messages": [{"role": "user", "content": "x"}], "echo": True}, "echo", "needs a prompt"),
    # sampling
    (plain(temperature=NAN), "temperature", "must be a finite number, got nan"),
    (plain(temperature=float("inf")), "temperature", "must be a finite number"),
    (plain(temperature="hot"), "temperature", "must be a finite number, got 'hot'"),
    (plain(temperature=-1), "temperature", "at least 0"),
    (plain(max_tokens=True), "max_tokens", "an integer of at least 0, got True"),
    (plain(max_tokens=0), "max_tokens", "0 with prompt_logprobs to score a prompt, got 0"),
    (plain(max_tokens=1.5), "max_tokens", "an integer"),
    (plain(max_tokens=10**30), "max_tokens", "an integer of at least 0, below 2**31, got 1000"),
    (plain(max_tokens=1e300), "max_tokens", "below 2**31"),
    (batch(max_tokens=1, max_completion_tokens=2), "max_completion_tokens", "give one of them"),
    (plain(min_tokens=33), "min_tokens", "at most max_tokens=32"),
    (plain(n=0), "n", "at least 1"),
    (plain(seed=-1), "seed", "between 0 and 4294967295"),
    (plain(seed=2**32), "seed", "between 0 and 4294967295"),
    (plain(top_k=0), "top_k", "or -1 to keep all tokens"),
    (plain(top_p=0), "top_p", "above 0 and at most 1"),
    (plain(stop=""), "stop", "a non-empty string or a list of them"),
    (plain(stop=["a", ""]), "stop", "a non-empty string or a list of them"),
    (plain(stop=5), "stop", "a non-empty string or a list of them"),
    (plain(stop_token_ids=5), "stop_token_ids", "a list of token ids"),
    (plain(stop_token_ids=[-1]), "stop_token_ids[0]", "must be a token id"),
    (plain(logit_bias=[[1, 2]]), "logit_bias", "an object such as"),
    (plain(logit_bias={"a": 1}), "logit_bias", "keyed by token ids"),
    (plain(logit_bias={"-1": 1}), "logit_bias", "keyed by token ids"),
    (plain(logit_bias={"1" * 5000: 1}), "logit_bias", "keyed by token ids"),
    (plain(logit_bias={"1": 101}), "logit_bias[1]", "between -100 and 100"),
    (plain(logit_bias={"1": True}), "logit_bias[1]", "between -100 and 100"),
    (plain(logit_bias={"1": NAN}), "logit_bias[1]", "between -100 and 100"),
    (plain(logit_bias={"1": 1, "01": 2}), "logit_bias", "once per token id"),
    (completions(logprobs=True), "logprobs", "number of alternatives"),
    (completions(logprobs=-1), "logprobs", "number of alternatives"),
    (batch(logprobs=5), "logprobs", "top_logprobs sets the number"),
    (batch(top_logprobs=5), "top_logprobs", "0 unless logprobs"),
    (plain(prompt_logprobs=1), "prompt_logprobs", "true or false"),
    (plain(echo=1), "echo", "true or false"),
    (plain(ignore_eos=1), "ignore_eos", "true or false"),
    (plain(return_token_ids="yes"), "return_token_ids", "true or false"),
]


@pytest.mark.parametrize("value, field, told", BAD, ids=[f"{b[1]}-{i}" for i, b in enumerate(BAD)])
def test_bad_rows(value, field, told):
  error = parse(value, model_name="m" if field == "model" else "")
  assert isinstance(error, RowError), error
  assert (error.index, error.row, error.field) == (4, 6, field)
  assert told in error.message
  assert len(error.message) < 200 and "\n" not in error.message
  if "custom_id" in value and field != "custom_id":
    assert error.request_id == value["custom_id"]


LIMITS = RowLimits(max_name_chars=5, max_messages=2, max_n=3, max_top_logprobs=4,
                   max_stop_strings=2, max_stop_chars=3, max_stop_token_ids=2, max_logit_bias=2)
SAY = {"role": "user", "content": "x"}


@pytest.mark.parametrize("value, field, told", [
    (plain(n=4), "n", "n: 4 samples are more than limits.max_n=3: use fewer, or raise the limit"),
    (plain(n=10**9), "n", "1000000000 samples are more"),
    (plain(n=10**300), "n", "more than a trillion samples"),
    (batch(logprobs=True, top_logprobs=5), "top_logprobs", "5 alternatives per token"),
    (completions(logprobs=5), "logprobs", "more than limits.max_top_logprobs=4"),
    (plain(stop=["a", "b", "c"]), "stop", "3 strings are more than limits.max_stop_strings=2"),
    (plain(stop="abcd"), "stop", "4 characters are more than limits.max_stop_chars=3"),
    (plain(stop=["a", "abcd"]), "stop[1]", "4 characters are more than limits.max_stop_chars=3"),
    (plain(stop_token_ids=[1, 2, 3]), "stop_token_ids", "more than limits.max_stop_token_ids=2"),
    (plain(logit_bias={"1": 1, "2": 1, "3": 1}), "logit_bias", "limits.max_logit_bias=2"),
    (batch(messages=[SAY] * 3), "messages", "3 messages are more than limits.max_messages=2"),
    (plain(id="abcdef"), "id", "6 characters are more than limits.max_name_chars=5"),
    (batch() | {"custom_id": "abcdef"}, "custom_id", "limits.max_name_chars=5"),
    (plain(model="abcdef"), "model", "6 characters are more than limits.max_name_chars=5"),
])
def test_limits_are_named(value, field, told):
  error = validate.parse(Record(4, 6, value), defaults=DEFAULTS, model_name="", job_seed=0,
                         limits=LIMITS)
  assert (error.field, error.code) == (field, "limit_exceeded") and told in error.message


def test_what_reaches_the_limits_passes():
  params = validate.parse(Record(0, 1, {
      "id": "abcde", "messages": [SAY] * 2, "n": 3, "logprobs": True, "top_logprobs": 4,
      "stop": ["abc", "b"], "stop_token_ids": [1, 2], "logit_bias": {"1": 1, "2": 1}}),
      defaults=DEFAULTS, model_name="", job_seed=0,
      limits=LIMITS).sampling_params
  assert (params.n, params.top_logprobs, params.stop) == (3, 4, ("abc", "b"))


def test_a_field_name_of_any_length_is_an_error():
  assert "limits.max_name_chars=1024" in parse(plain(**{"x" * 10**6: 1})).message


def test_floats_without_a_fraction_are_integers():
  row = parse({"id": 7.0, "prompt_token_ids": [1.0, 2], "max_tokens": 3.0, "min_tokens": 1.0,
               "top_k": 4.0, "n": 2.0, "seed": 5.0, "stop_token_ids": [6.0], "logprobs": True,
               "top_logprobs": 1.0})
  assert row.request_id == "7" and row.prompt.tolist() == [1, 2]
  params = row.sampling_params
  assert (params.max_tokens, params.min_tokens, params.top_k, params.n, params.seed,
          params.stop_token_ids, params.top_logprobs) == (3, 1, 4, 2, 5, (6,), 1)
  assert all(type(x) is int for x in (params.n, params.seed, *params.stop_token_ids))
  params = parse(completions(logprobs=2.0, max_tokens=1e2)).sampling_params
  assert (params.top_logprobs, params.max_tokens) == (2, 100)


@pytest.mark.parametrize("value, code", [
    (batch(model="x"), "model_not_found"), (plain(max_token=1), "unknown_field"),
    ({"id": "a"}, "missing_field"), (batch(stream=True), "unsupported"),
    (plain(n=0), "invalid_value")])
def test_codes(value, code):
  assert parse(value, model_name="m").code == code


def test_long_values_are_cut_short_in_messages():
  assert len(parse(plain(stop=["", "x" * 10_000])).message) < 150


def test_a_record_that_was_not_read_stays_an_error():
  error = RowError(4, 6, None, "", "bad", "invalid_json")
  assert parse(error) is error


HUGE = st.sampled_from([10**18, -2**63, 2**64, 10**400, 1e308, -1e-320, float("inf"), 7.0, 2.0**53])
JSON = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | HUGE
                    | st.text(max_size=4) | st.sampled_from(["\0", "9" * 5000, "x" * 2000]),
                    lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=4), x,
                                                                        max_size=3), max_leaves=6)
NAMES = sorted(fields.FIELDS["plain"] | {"custom_id", "method", "url", "body"})


@settings(max_examples=150, deadline=None)
@given(st.dictionaries(st.sampled_from(NAMES), JSON, max_size=4))
def test_no_row_raises(values):
  for value in (values, plain(**values), batch() | {"body": values},
                batch() | {"body": batch()["body"] | values},
                completions() | {"body": completions()["body"] | values}):
    assert isinstance(parse(value), (validate.Row, RowError))


ROW = parse(plain(max_tokens=10, stop_token_ids=[4], logit_bias={"3": 1}))


@pytest.mark.parametrize("token_ids, vocab_size, max_len, field, told", [
    ([], 9, 100, "prompt", "the prompt has no tokens"),
    ([1, 9], 9, 100, "prompt", "prompt token 1 is 9, but the model's vocabulary has 9 tokens"),
    ([1, -1], 9, 100, "prompt", "prompt token 1 is -1"),
    ([1], 4, 100, "stop_token_ids", "names token 4, but the model's vocabulary has 4 tokens"),
    ([1] * 20, 9, 20, "prompt", "the prompt has 20 tokens, which leaves no room in the context of "
     "20: shorten it to at most 19"),
    ([1] * 11, 9, 20, "max_tokens", "the prompt has 11 tokens and max_tokens is 10, together over "
     "the context of 20: shorten the prompt or set max_tokens to at most 9"),
])
def test_check_prompt(token_ids, vocab_size, max_len, field, told):
  error = validate.check_prompt(ROW, np.array(token_ids, np.int32), vocab_size, max_len)
  assert (error.row, error.request_id, error.field) == (6, "p", field)
  assert told in error.message
  assert (error.code == "context_length_exceeded") == ("context" in error.message)


def test_check_prompt_accepts_what_just_fits():
  assert validate.check_prompt(ROW, np.full(10, 8, np.int32), 9, 20) is None
  assert validate.check_prompt(ROW, [8] * 10, 9, 20) is None


def test_scoring_a_prompt_that_fills_the_context_needs_no_room():
  row = parse(plain(max_tokens=0, prompt_logprobs=True))
  assert validate.check_prompt(row, [1] * 20, 9, 20) is None
  assert "shorten it to at most 20" in validate.check_prompt(row, [1] * 21, 9, 20).message


@pytest.mark.parametrize("fields, prompt_len, max_tokens", [
    ({}, 60, 32), ({}, 80, 20), ({}, 99, 1), ({}, 100, 32), ({"max_tokens": 32}, 80, 32),
    ({"min_tokens": 20}, 80, 20), ({"min_tokens": 21}, 80, 32)])
def test_the_default_of_max_tokens_shrinks_to_the_room(fields, prompt_len, max_tokens):
  row = validate.fit_default(parse(plain(**fields)), prompt_len, 100)
  assert row.sampling_params.max_tokens == max_tokens
  error = validate.check_prompt(row, [1] * prompt_len, 9, 100)
  assert (error is None) == (prompt_len + max_tokens <= 100)
  if "min_tokens" in fields and error:
    assert error.field == "min_tokens" and "min_tokens to at most 20" in error.message


def test_check_prompt_of_top_logprobs_and_bias():
  row = parse(plain(logprobs=True, top_logprobs=6))
  assert "exceed the vocabulary of 5" in validate.check_prompt(row, [1], 5, 100).message
  row = parse(plain(logit_bias={"5": 1}))
  assert validate.check_prompt(row, [1], 5, 100).field == "logit_bias"


def test_duplicate_ids():
  ids = validate.DuplicateIds()
  assert ids.check(parse(batch())) is None
  assert ids.check(parse(plain())) is None
  error = ids.check(parse(batch()))
  assert (error.code, error.field, error.request_id) == ("duplicate_id", "custom_id", "c")
  assert error.message == "custom_id 'c' is used by an earlier row: make it unique"
  assert ids.check(parse(plain(id="row-6"))) is None
  assert ids.check(parse({"prompt": "hi"})).field == "id"  # the made-up id is "row-6" too


def test_duplicate_ids_keep_hashes_only():
  ids = validate.DuplicateIds()
  ids.check(parse(plain(id="x" * 1000)))
  assert sum(map(sys.getsizeof, ids._seen)) < 100
