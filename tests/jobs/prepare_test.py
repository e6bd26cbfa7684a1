"""A file becomes requests on disk: what is kept, what is an error, what the model's limits say."""

import dataclasses
import json
import os

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from batchjax.config import ConfigError, EngineConfig, JobConfig, ModelSource
from batchjax.io.store import RequestReader
from batchjax.jobs.prepare import BadRow, prepare, stop_strings
from batchjax.testing.fake_model import fake_config
from batchjax.testing.fake_tokenizer import FakeTokenizer
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
