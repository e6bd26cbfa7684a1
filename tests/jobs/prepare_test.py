"""A file becomes requests on disk: what is kept, what is an error, what the model's limits say."""

import dataclasses
import functools
import json
import os

from hypothesis import given, settings, strategies as st
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from batchjax.config import ConfigError, EngineConfig, JobConfig, ModelSource, RowLimits
from batchjax.io import fields, validate
from batchjax.io.store import RequestReader
from batchjax.jobs import prepare as prepare_lib
from batchjax.jobs.prepare import BadRow, prepare, stop_strings
from batchjax.testing.fake_model import fake_config
from batchjax.testing.fake_tokenizer import FakeTokenizer
from batchjax.text import build_stop_table
from batchjax.types import SamplingParams

SHAPE = fake_config(max_len=64, eos=(0,))
TEMPLATE = ("{% if messages[0].role != 'user' %}{{ raise_exception('begin with the user') }}"
            "{% endif %}{{ mark }}{% for m in messages %}[{{ m.content }}]{% endfor %}"
            "{% if add_generation_prompt %}>{% endif %}")


class MarkingTokenizer(FakeTokenizer):
  """Puts "^" where special tokens are added."""

  chat_template = TEMPLATE

  def encode_batch(self, texts, add_special_tokens=True):
    return [self.encode("^" * add_special_tokens + text) for text in texts]


def make_config(**fields):
  values = dict(model=ModelSource(path=os.devnull), sampling=SamplingParams(max_tokens=8),
                engine=EngineConfig(num_pages=100, page_size=4))
  return JobConfig(**values | fields)


def run(tmp_path, rows, config=None, tokenizer=FakeTokenizer):
  """(what was found, the stored rows, their prompts as text)."""
  (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
  found = prepare(str(tmp_path / "in.jsonl"), tmp_path / "store", config or make_config(), SHAPE,
                  tokenizer())
  with RequestReader(tmp_path / "store") as store:
    stored = store.rows(0, len(store))
    prompts = [FakeTokenizer().decode(row.request.prompt_token_ids.tolist()) for row in stored]
  return found, stored, prompts


def test_good_rows_are_stored_at_their_place_and_bad_ones_returned(tmp_path):
  found, stored, prompts = run(tmp_path, [
      {"id": "a", "prompt": "one"}, {"id": "b"}, {"prompt_token_ids": [5, 6], "max_tokens": 2},
      {"id": "a", "prompt": "two"}, {"id": "c", "prompt": "three", "seed": 9}])
  assert found.num_rows == 5
  assert [(e.index, e.row, e.request_id, e.code) for e in found.errors] == [
      (1, 2, "b", "missing_field"), (3, 4, "a", "duplicate_id")]
  assert [row.index for row in stored] == [0, 2, 4]
  assert [row.request.request_id for row in stored] == ["a", "row-3", "c"]
  assert prompts == ["one", FakeTokenizer().decode([5, 6]), "three"]
  assert [row.request.sampling_params.max_tokens for row in stored] == [8, 2, 8]
  assert stored[2].request.sampling_params.seed == 9


def test_ids_are_unique_over_the_whole_file(tmp_path):
  rows = [{"id": f"r{i}", "prompt": "x"} for i in range(4500)] + [{"id": "r0", "prompt": "x"}]
  found, stored, _ = run(tmp_path, rows)
  assert found.num_rows == 4501 and len(stored) == 4500
  assert [(e.index, e.field) for e in found.errors] == [(4500, "id")]
  assert [row.index for row in stored] == list(range(4500))


def test_a_row_that_was_bad_does_not_reserve_its_id(tmp_path):
  found, stored, _ = run(tmp_path, [{"id": "a"}, {"id": "a", "prompt": "x"}])
  assert [e.index for e in found.errors] == [0] and [row.index for row in stored] == [1]


def test_special_tokens_are_added_to_text_but_not_to_what_a_template_wrote(tmp_path):
  say = lambda text: [{"role": "user", "content": text}]
  found, _, prompts = run(tmp_path, [
      {"prompt": "plain"}, {"messages": say("chat")}, {"prompt": "again"},
      {"messages": say("x"), "chat_template_kwargs": {"mark": "!"}}], tokenizer=MarkingTokenizer)
  assert not found.errors
  assert prompts == ["^plain", "[chat]>", "^again", "![x]>"]


def test_a_template_that_refuses_messages_makes_one_error_row(tmp_path):
  found, stored, _ = run(tmp_path, [
      {"id": "s", "messages": [{"role": "system", "content": "x"}]},
      {"id": "u", "messages": [{"role": "user", "content": "x"}]}], tokenizer=MarkingTokenizer)
  assert [str(e) for e in found.errors] == [
      "row 1 (s): the chat template refused the messages: begin with the user"]
  assert found.errors[0].field == "messages" and len(stored) == 1


def test_the_configurations_template_replaces_the_models(tmp_path):
  (tmp_path / "t.jinja").write_text("<{{ messages[0].content }}>")
  rows = [{"messages": [{"role": "system", "content": "x"}]}]
  config = make_config(chat_template=str(tmp_path / "t.jinja"))
  assert run(tmp_path, rows, config, MarkingTokenizer)[2] == ["<x>"]
  (tmp_path / "t.jinja").write_text("{% for %}")
  with pytest.raises(ConfigError, match="the chat template is not valid at line 1"):
    run(tmp_path, rows, config, MarkingTokenizer)


class CallingTokenizer(FakeTokenizer):
  """Has a template for tools beside its own, and a third that is never used."""

  chat_templates = {
      "default": "{% for m in messages %}[{{ m.role }} {{ m.content }}"
                 "{% for c in m.tool_calls %} {{ c.function.arguments | tojson }}{% endfor %}]"
                 "{% endfor %}", "rag": "{% for %}",
      "tool_use": "{{ tools[0].function.name }}: {{ messages[0].content }}"}


def test_messages_are_the_same_from_every_file(tmp_path):
  say = lambda role, content, calls=None: {
      "role": role, "content": content, "refusal": None, "annotations": [], "tool_calls": calls}
  function = {"name": "add", "arguments": '{"a": 1}', "description": None}
  rows = [{"id": "clean", "messages": [{"role": "user", "content": "x"}]},
          {"id": "sdk", "messages": [say("user", "x")]},
          {"id": "call", "messages": [say("user", "x"), say("assistant", None, [
              {"type": "function", "index": None, "function": function}])]}]
  want = ["[user x]", "[user x]", '[user x][assistant  {"a": 1}]']
  assert run(tmp_path, rows, tokenizer=CallingTokenizer)[2] == want
  pq.write_table(pa.Table.from_pylist(rows), tmp_path / "in.parquet")
  prepare(str(tmp_path / "in.parquet"), tmp_path / "store", make_config(), SHAPE,
          CallingTokenizer())
  with RequestReader(tmp_path / "store") as store:
    assert [FakeTokenizer().decode(row.request.prompt_token_ids.tolist())
            for row in store.rows(0, len(store))] == want


def test_tools_take_the_template_of_their_name_or_are_refused(tmp_path):
  tools = [{"type": "function", "function": {"name": "add"}}]
  rows = [{"id": "a", "messages": [{"role": "user", "content": "x"}], "tools": tools},
          {"id": "b", "messages": [{"role": "user", "content": "x"}], "tools": []}]
  assert run(tmp_path, rows, tokenizer=CallingTokenizer)[2] == ["add: x", "[user x]"]
  found, _, prompts = run(tmp_path, rows, tokenizer=MarkingTokenizer)
  error, = found.errors
  assert (error.request_id, error.field, error.code) == ("a", "tools", "unsupported")
  assert "never reads tools" in error.message and prompts == ["[x]>"]


def test_a_malformed_call_is_one_error_row(tmp_path):
  call = {"type": "function", "function": {"name": "add", "arguments": "a=1"}}
  messages = [{"role": "user", "content": "x"}, {"role": "assistant", "tool_calls": [call]}]
  found, stored, _ = run(tmp_path, [{"id": "bad", "messages": messages}, {"id": "b", "prompt": "x"}],
                         tokenizer=CallingTokenizer)
  assert [(e.request_id, e.field) for e in found.errors] == [
      ("bad", "messages[1].tool_calls[0].function.arguments")]
  assert len(stored) == 1


@pytest.mark.parametrize("num_pages, fits", [(9, True), (8, False)])
def test_a_row_must_fit_the_pool_alone(tmp_path, num_pages, fits):
  """10 + 6 tokens are 4 pages; each of 4 levels and the row's own run may start another."""
  config = make_config(engine=EngineConfig(num_pages=num_pages, page_size=4, max_levels=4))
  found, stored, _ = run(tmp_path, [{"id": "a", "prompt": "x" * 10, "max_tokens": 6}], config)
  assert bool(stored) == fits
  if not fits:
    error, = found.errors
    assert (error.field, error.code) == ("max_tokens", "context_length_exceeded")
    assert "need up to 9 KV pages of 4 tokens, the pool has 8: shorten them" in error.message


@pytest.mark.parametrize("prompt_len, max_tokens, fits", [
    (56, 8, True), (57, 8, False), (63, 1, True), (64, 1, False)])
def test_prompt_and_completion_share_the_context(tmp_path, prompt_len, max_tokens, fits):
  found, stored, _ = run(tmp_path, [{"prompt": "x" * prompt_len, "max_tokens": max_tokens}])
  assert bool(stored) == fits
  assert fits or found.errors[0].code == "context_length_exceeded"


def test_strict_stops_at_the_first_bad_row_and_leaves_no_store(tmp_path):
  config = dataclasses.replace(make_config(), strict=True)
  with pytest.raises(BadRow, match=r"row 2 \(b\): .* give it one"):
    run(tmp_path, [{"id": "a", "prompt": "x"}, {"id": "b"}, {"id": "c"}], config)
  assert {path.name for path in tmp_path.iterdir()} == {"in.jsonl"}


@pytest.mark.parametrize("max_tokens, prompt_len, stored", [
    (None, 60, 4), (None, 63, 1), (None, 64, None), (8, 60, None), (0, 64, 0)])
def test_only_a_default_shrinks_and_only_scoring_fills_the_context(tmp_path, max_tokens, prompt_len,
                                                                   stored):
  row = {"prompt": "x" * prompt_len}
  row |= {} if max_tokens is None else {"max_tokens": max_tokens, "prompt_logprobs": not max_tokens}
  _, rows, _ = run(tmp_path, [row])
  assert [r.request.sampling_params.max_tokens for r in rows] == (
      [] if stored is None else [stored])


def test_the_row_whose_stop_strings_are_too_much_is_an_error_and_the_others_run(tmp_path):
  limits = RowLimits(max_stop_table_bytes=6 * 2 * SHAPE.vocab_size)  # six states
  found, stored, _ = run(tmp_path, [
      {"id": "a", "prompt": "x", "stop": "abcd"}, {"id": "b", "prompt": "x", "stop": ["wxyz"]},
      {"id": "c", "prompt": "x", "stop": ["abcd", "abcde"]}, {"id": "d", "prompt": "x", "stop": "yz"},
      {"id": "d", "prompt": "x", "stop": "q"}, {"id": "e", "prompt": "x"},
      {"id": "f", "prompt": "x", "stop": "q"}], make_config(limits=limits))
  assert [row.request.request_id for row in stored] == ["a", "c", "d", "e"]
  assert [(e.request_id, e.field, e.code) for e in found.errors] == [
      ("b", "stop", "limit_exceeded"), ("d", "id", "duplicate_id"), ("f", "stop", "limit_exceeded")]
  assert str(found.errors[0]).endswith(
      f"or raise limits.max_stop_table_bytes={12 * SHAPE.vocab_size}")
  with RequestReader(tmp_path / "store") as store:
    build_stop_table(stop_strings(store), [b"x"] * SHAPE.vocab_size, limits.max_stop_table_bytes)


def test_a_special_token_written_as_a_stop_string_is_its_id(tmp_path):
  class Special(FakeTokenizer):
    special_ids = frozenset([0, 5])

    def decode(self, token_ids, skip_special_tokens=True, *, is_continuation=False):
      return self.token_name(token_ids[0]).decode()

    def token_name(self, token_id):
      return {0: b"<end>", 5: b"<|im_end|>"}[token_id]

  _, stored, _ = run(tmp_path, [{"prompt": "x", "stop": ["<|im_end|>", "a", "<end>"],
                                 "stop_token_ids": [7, 5]},
                                {"prompt": "x", "stop": "<|im_end|>"}], tokenizer=Special)
  params = [row.request.sampling_params for row in stored]
  assert [(p.stop, p.stop_token_ids) for p in params] == [(("a",), (7, 5, 0)), ((), (5,))]


class Fragile(MarkingTokenizer):
  """Raises what a text asks for."""

  def encode_batch(self, texts, add_special_tokens=True):
    for name, error in RAISED.items():
      if any(f"raise {name}" in text for text in texts):
        raise error
    return super().encode_batch(texts, add_special_tokens)


class PanicException(BaseException):
  """As the tokenizers library has it."""


RAISED = {"memory": MemoryError(), "recursion": RecursionError("too deep"),
          "value": ValueError("no\nsuch text"), "panic": PanicException("called unwrap on None"),
          "interrupt": KeyboardInterrupt()}


def test_what_a_library_raises_is_the_error_of_the_row_that_made_it(tmp_path):
  say = lambda text: [{"role": "user", "content": text}]
  rows = [{"id": "a", "prompt": "one"}, {"id": "b", "prompt": "raise memory"},
          {"id": "c", "messages": say("raise recursion")}, {"id": "d", "prompt": "raise value"},
          {"id": "e", "prompt": "raise panic"}, {"id": "f", "messages": say("two")}]
  found, _, prompts = run(tmp_path, rows, tokenizer=Fragile)
  assert prompts == ["^one", "[two]>"]
  assert [(e.request_id, e.field, e.message.removesuffix(": change it, or remove the row"))
          for e in found.errors] == [
      ("b", "prompt", "prompt cannot be processed (MemoryError)"),
      ("c", "messages", "messages cannot be processed (RecursionError: too deep)"),
      ("d", "prompt", "prompt cannot be processed (ValueError: no such text)"),
      ("e", "prompt", "prompt cannot be processed (PanicException: called unwrap on None)")]
  with pytest.raises(KeyboardInterrupt):
    run(tmp_path, [{"prompt": "raise interrupt"}], tokenizer=Fragile)


def test_whatever_parsing_raises_is_the_rows_error_with_its_id(tmp_path, monkeypatch):
  parse = validate.parse

  def fail_at_two(record, **options):
    if record.index == 1:
      raise LookupError("in a library")
    return parse(record, **options)

  monkeypatch.setattr(validate, "parse", fail_at_two)
  found, stored, _ = run(tmp_path, [{"id": name, "prompt": "x"} for name in "abc"])
  assert [str(e) for e in found.errors] == ["row 2 (b): the row cannot be processed "
                                            "(LookupError: in a library): change it, or remove the row"]
  assert len(stored) == 2


def test_a_template_that_would_not_end_makes_an_error_of_each_row_that_lets_it(tmp_path):
  (tmp_path / "t.jinja").write_text(
      "{% set n = messages[0].content|int %}{% for i in range(n) %}{% for j in range(n) %}"
      "{% endfor %}{% endfor %}{{ 'x' * n * n }}")
  say = lambda text: {"id": text, "messages": [{"role": "user", "content": text}]}
  config = make_config(chat_template=str(tmp_path / "t.jinja"),
                       limits=RowLimits(max_template_secs=0.2, max_template_chars=400))
  found, _, prompts = run(tmp_path, [say("99999"), say("3"), say("30")], config)
  assert prompts == ["x" * 9]
  assert [e.request_id for e in found.errors] == ["99999", "30"]
  assert "limits.max_template_secs=0.2" in found.errors[0].message
  assert "limits.max_template_chars=400" in found.errors[1].message


@pytest.mark.parametrize("depth", [100, 300, 500, 900, 950, 990, 1000, 5000, 100_000])
def test_content_of_any_depth_is_at_most_an_error_row(tmp_path, depth):
  deep = "[" * depth + "]" * depth
  lines = ['{"id": "a", "prompt": "x"}']
  for message in ('{"role": "user", "content": %s}', '{"role": "user", "content": "x", "more": %s}',
                  '{"role": "assistant", "tool_calls": [{"a": %s}]}'):
    lines.append('{"messages": [%s]}' % (message % deep))
  lines += ['{"prompt": %s}' % deep, '{"prompt": "x", "logit_bias": {"1": %s}}' % deep,
            '{"prompt": "x", "metadata": %s}' % deep, '{"id": "z", "prompt": "x"}']
  (tmp_path / "in.jsonl").write_text("\n".join(lines))
  (tmp_path / "t.jinja").write_text("{{ messages|tojson|length }}")
  config = make_config(chat_template=str(tmp_path / "t.jinja"))
  found = prepare(str(tmp_path / "in.jsonl"), tmp_path / "store", config, SHAPE, FakeTokenizer())
  with RequestReader(tmp_path / "store") as store:
    indices = store.indices.tolist()
  assert {0, len(lines) - 1} <= set(indices) and found.num_rows == len(lines)
  assert sorted(indices + [e.index for e in found.errors]) == list(range(len(lines)))


def test_long_prompts_are_tokenized_few_at_a_time(tmp_path, monkeypatch):
  monkeypatch.setattr(prepare_lib, "_BATCH_CHARS", 10)
  sizes = []

  class Counting(FakeTokenizer):
    def encode_batch(self, texts, add_special_tokens=True):
      sizes.append(len(texts))
      return super().encode_batch(texts)

  _, _, prompts = run(tmp_path, [{"prompt": "x" * size} for size in (4, 4, 4, 30, 1)],
                      tokenizer=Counting)
  assert prompts == ["x" * size for size in (4, 4, 4, 30, 1)] and sizes == [3, 1, 1]


TEXT = st.text(max_size=4) | st.sampled_from(["\0", "\ud800", "9" * 5000, "\u2028", "role"])
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXT
    | st.sampled_from([10**9, 10**400, 2.0**70, 1e308, 7.0, -0.0]),
    lambda x: st.lists(x, max_size=3) | st.dictionaries(TEXT, x, max_size=3)
    | st.integers(1, 2000).map(lambda depth: functools.reduce(lambda v, _: [v], range(depth), 0)),
    max_leaves=6)
FIELDS = st.dictionaries(st.sampled_from(sorted(fields.FIELDS["plain"] | {"x"})), JSON, max_size=3)
MESSAGE = st.fixed_dictionaries({"role": st.sampled_from(["user", "tool"])}, optional={
    name: JSON for name in ("content", "tool_calls", "name", "more")})
BODY = st.builds(lambda base, more: base | more,
                 st.fixed_dictionaries({"messages": st.lists(MESSAGE, min_size=1, max_size=2)})
                 | st.just({"prompt": "x"}), FIELDS)
ROW = BODY | JSON | st.builds(
    lambda url, body: {"custom_id": "c", "method": "POST", "url": url, "body": body},
    st.sampled_from(["/v1/chat/completions", "/v1/completions"]), BODY)


def dump(value):
  """The JSON of values of any depth."""
  if isinstance(value, list) and len(value) == 1:  # chains of lists
    depth = 0
    while isinstance(value, list) and len(value) == 1:
      value, depth = value[0], depth + 1
    return "[" * depth + dump(value) + "]" * depth
  if isinstance(value, list):
    return "[" + ",".join(map(dump, value)) + "]"
  if isinstance(value, dict):
    return "{" + ",".join(f"{json.dumps(k)}:{dump(v)}" for k, v in value.items()) + "}"
  return json.dumps(value)


@settings(max_examples=60, deadline=None)
@given(st.lists(ROW, min_size=1, max_size=8))
def test_every_row_of_any_contents_is_a_request_or_an_error(tmp_path_factory, values):
  folder = tmp_path_factory.mktemp("fuzz")
  (folder / "in.jsonl").write_text("\n".join(map(dump, values)))
  found = prepare(str(folder / "in.jsonl"), folder / "store", make_config(), SHAPE,
                  MarkingTokenizer())
  with RequestReader(folder / "store") as store:
    indices = store.indices.tolist()
  assert found.num_rows == len(values)
  assert sorted(indices + [e.index for e in found.errors]) == list(range(len(values)))


def test_stop_strings_are_each_distinct_tuple(tmp_path):
  run(tmp_path, [{"prompt": "x", "stop": stop} for stop in ("a", ["b", "c"], ["a"], ["c", "b"])]
      + [{"prompt": "x"}])
  with RequestReader(tmp_path / "store") as store:
    assert stop_strings(store) == (("a",), ("b", "c"), ("c", "b"))


def test_no_good_row_at_all(tmp_path):
  found, stored, _ = run(tmp_path, [{}, {"prompt": ""}])
  assert (found.num_rows, len(found.errors), stored) == (2, 2, [])
  with RequestReader(tmp_path / "store") as store:
    assert np.array_equal(store.indices, []) and stop_strings(store) == ()


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: None],
                         ids=["pipe", "folder", "nothing"])
def test_a_chat_template_that_is_no_file_is_refused_and_not_waited_for(tmp_path, make):
  path = str(tmp_path / "t.jinja")
  make(path)
  with pytest.raises(ConfigError, match="chat_template=.*t.jinja"):
    run(tmp_path, [{"prompt": "a"}], make_config(chat_template=path))
