"""Rows to score: what they may hold, where continuations begin, and what is written of them."""

import dataclasses
import math

import numpy as np
import pyarrow.parquet as pq
import pytest

from batchjax.config import RowLimits
from batchjax.io import files, records, scores, validate
from batchjax.io.fields import InvalidField
from batchjax.io.records import Record, RowError
from batchjax.io.store import RequestReader, RequestWriter, StoredRow
from batchjax.types import Choice, Completion, Request, SamplingParams, SCORING


def parse(value, **options):
  options = {"defaults": SamplingParams(), "model_name": "", "job_seed": 0, "scores": True} | options
  return validate.parse(Record(0, 1, {"id": "a"} | value), **options)


PAIR = {"prompt": "x y", "continuation": " z"}
IDS = {"prompt_token_ids": [5, 6], "continuation_token_ids": [7]}


@pytest.mark.parametrize("value, form, continuations", [
    (PAIR, "score", [" z"]), (IDS, "score", [[7]]),
    ({"prompt": "x", "continuations": ["a"]}, "choices", ["a"]),
    ({"prompt": "", "continuations": ["a", "b"]}, "choices", ["a", "b"]),
    (IDS | {"continuation_token_ids": [[7], [8, 9.0]]}, "choices", [[7], [8, 9]]),
    ({"prompt": "x", "continuation_token_ids": [7]}, "score", [[7]]),
    ({"text": "whole"}, "document", ["whole"]),
    (PAIR | {"metadata": {"any": 1}, "continuations": None}, "score", [" z"]),
    ({"messages": [{"role": "user", "content": "x"}], "continuation": "y"}, "score", ["y"])])
def test_good_rows(value, form, continuations):
  row = parse(value)
  assert row.form == form and row.sampling_params == SCORING and row.request_id == "a"
  assert [c if isinstance(c, str) else c.tolist() for c in row.continuations] == continuations


@pytest.mark.parametrize("value, field, message", [
    ({}, "continuation", "no continuation or continuations or continuation_token_ids: give it one"),
    ({"prompt": "x"}, "continuation", "or text alone to score a whole text"),
    ({"continuation": "x"}, "prompt", "no prompt or messages or prompt_token_ids: give it one"),
    (PAIR | {"continuations": ["x"]}, "continuations", "both continuation and continuations: keep one"),
    (PAIR | {"text": "x"}, "prompt", "both text and prompt: text is scored whole, keep one of them"),
    ({"text": ""}, "text", "text must be a string that is not empty"),
    ({"text": ["x"]}, "text", "text must be a string that is not empty"),
    (PAIR | {"continuation": ""}, "continuation", "a string that is not empty, got"),
    ({"prompt": "x", "continuations": []}, "continuations", "a list of strings, one at least, got []"),
    ({"prompt": "x", "continuations": "ab"}, "continuations", "a list of strings, one at least, got"),
    ({"prompt": "x", "continuations": ["a", 3]}, "continuations[1]", "not empty, got 3"),
    (IDS | {"continuation_token_ids": []}, "continuation_token_ids", "is empty: give it at least one"),
    (IDS | {"continuation_token_ids": [[7], []]}, "continuation_token_ids[1]", "is empty"),
    (IDS | {"continuation_token_ids": [[7], 8]}, "continuation_token_ids[1]", "a list of token ids, got 8"),
    (IDS | {"continuation_token_ids": [-1]}, "continuation_token_ids[0]", "an integer of at least 0"),
    ({"prompt_token_ids": [5], "continuation": "x"}, "continuation", "give continuation_token_ids, or"),
    ({"prompt_token_ids": [], "continuation_token_ids": [5]}, "prompt_token_ids", "is empty"),
    (PAIR | {"prompt": 3}, "prompt", "a string or a list of token ids, got 3"),
    (PAIR | {"n": 2}, "n", "n is not a field of a row to score: "),
    (PAIR | {"continuatoin": "x"}, "continuatoin", "did you mean continuation"),
    (PAIR | {"model": "other"}, "model", "this job runs 'mine'"),
    (PAIR | {"id": ["c"]}, "id", "a non-empty string"),
    ({"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {}}, "body", "not a field")])
def test_bad_rows_name_field_and_remedy(value, field, message):
  error = parse(value, model_name="mine")
  assert isinstance(error, RowError) and (error.field, error.row) == (field, 1)
  assert message in error.message


def test_what_a_row_may_ask_for_is_bounded():
  many = {"prompt": "x" * 50, "continuations": ["a"] * 20}
  assert parse(many).form == "choices"
  assert "limits.max_n=19" in parse(many, limits=RowLimits(max_n=19)).message
  for row in (parse(many), dataclasses.replace(parse(many), prompt=[{"role": "user"}])):
    assert len(scores.texts(row, "x" * 50, RowLimits(max_line_bytes=1020))) == 21
    with pytest.raises(InvalidField, match="continuations: 1020 characters, the prompt before each counted, "
                       "are more than limits.max_line_bytes=1019"):
      scores.texts(row, "x" * 50, RowLimits(max_line_bytes=1019))


def encode(text):
  """Two-letter tokens where two letters stand together, as a BPE merges them; spaces join what follows."""
  tokens, i = [], 0
  while i < len(text):
    size = 2 if text[i:i + 2].isalpha() and len(text[i:i + 2]) == 2 or (
        text[i] == " " and i + 1 < len(text)) else 1
    tokens.append(text[i:i + size])
    i += size
  return tokens


def requests_of(value, first_token=None, bos=()):
  """The requests of a row as lists of pieces of text, each with where its score begins."""
  row, ids = parse(value), {}
  assert isinstance(row, validate.Row), row
  number = lambda piece: ids.setdefault(piece, 10 + len(ids))
  tokens = [text.tolist() if isinstance(text, np.ndarray) else
            [number(piece) for piece in [*bos, *encode(text)]] for text in scores.texts(row, row.prompt, RowLimits())]
  names = lambda tokens: [next((name for name, i in ids.items() if i == token), int(token))
                          for token in tokens]
  return [(part.request_id, names(tokens), part.sampling_params.prompt_logprobs_start)
          for part, tokens in scores.requests_of(row, [np.array(t, np.int32) for t in tokens],
                                                 first_token)]


@pytest.mark.parametrize("value, tokens, start", [
    # The whole begins with the prompt's tokens: what lm-evaluation-harness counts.
    ({"prompt": "ab cd", "continuation": " ef"}, ["ab", " c", "d", " e", "f"], 3),
    # White space at the end of the prompt is the continuation's, whatever it is.
    ({"prompt": "ab ", "continuation": "cd"}, ["ab", " c", "d"], 1),
    ({"prompt": "ab.\n", "continuation": "cd"}, ["ab", ".", "\n", "cd"], 2),
    # A token that spans the border is scored: none of the continuation's text is lost.
    ({"prompt": "ab c", "continuation": "d"}, ["ab", " c", "d"], 2),
    ({"prompt": "abc", "continuation": "def"}, ["ab", "cd", "ef"], 1),
    ({"prompt": "ab", "continuation": "."}, ["ab", "."], 1),
    (IDS, [5, 6, 7], 2)])
def test_where_the_continuation_begins(value, tokens, start):
  assert requests_of(value) == [("a", tokens, start)]


def test_a_text_begins_behind_the_token_that_begins_texts():
  for value in ({"text": "ab"}, {"prompt": "", "continuation": "ab"}, {"prompt": "\n ", "continuation": "ab"}):
    spaces = list(value.get("prompt", ""))[:1] if "text" not in value else []
    want = [*spaces, *([" a", "b"] if spaces else ["ab"])]
    assert requests_of(value, first_token=3) == [("a", [3, *want], 1)]
    assert requests_of(value, bos=["<s>"]) == [("a", ["<s>", *want], 1)]
    with pytest.raises(InvalidField, match="nothing precedes the first token, .*: give a prompt"):
      requests_of(value)


def test_choices_are_requests_with_ids_of_their_own():
  got = requests_of({"prompt": "ab ", "continuations": ["cd", "c", "."]})
  assert got == [("a[0]", ["ab", " c", "d"], 1), ("a[1]", ["ab", " c"], 1), ("a[2]", ["ab", " .",], 1)]


def test_a_continuation_without_a_token_is_named():
  row = dataclasses.replace(parse(PAIR), form="choices", continuations=("a", ""))
  same = np.array([1, 2], np.int32)
  with pytest.raises(InvalidField, match=r"continuations\[1\] adds no token to the prompt: lengthen it"):
    scores.requests_of(row, [same, np.array([1, 2, 3], np.int32), same], None)


def answer(form, name, tokens, start, logprobs, best):
  """A stored request and what came back; tokens before `start` have no scores."""
  nulls, prompt = np.full(start, np.nan, np.float32), np.array(tokens, np.int32)
  values = np.append(nulls, np.array(logprobs, np.float32))
  params = dataclasses.replace(SCORING, prompt_logprobs_start=start)
  return (StoredRow(0, 1, form, "", False, False, Request(name, prompt, params)),
          Completion(name, (Choice(0, np.zeros(0, np.int32), "length"),), len(tokens), 0, values,
                     np.append(np.full(start, -1), best)[:, None].astype(np.int32), values[:, None]))


ONE = answer("score", "a", [1, 2, 3, 4], 2, [-0.1, -2.5], [3, 9])
CHOICES = [answer("choices", f"a[0][{i}]", [1, i], 1, [-i - 0.5], [1]) for i in (1, 0, 2)]
TEXT = answer("document", "t", [1, 2, 3], 1, [-1.0, -3.0], [2, 3])
ROWS = [scores.format_scores(answers) for answers in ([ONE], CHOICES, [TEXT])]


def test_output_rows():
  one, choices, text = ROWS
  assert one == {"id": "a", "logprob": -2.6, "num_tokens": 2, "is_greedy": False, "token_ids": [3, 4],
                 "token_logprobs": [-0.1, -2.5]}
  assert choices["id"] == "a[0]", "an id may look like that of a part"
  assert [(c["index"], c["logprob"], c["is_greedy"]) for c in choices["choices"]] == [
      (0, -0.5, False), (1, -1.5, True), (2, -2.5, False)]
  assert (text["is_greedy"], text["perplexity"]) == (True, pytest.approx(math.exp(2)))


def test_an_impossible_token_has_no_perplexity():
  row = scores.format_scores([answer("document", "t", [1, 2], 1, [-3e38], [3])])
  assert (row["token_logprobs"], row["perplexity"]) == ([-9999.0], None)


@pytest.mark.parametrize("name", ["o.jsonl", "o.jsonl.gz", "o.parquet"])
def test_files_hold_them(tmp_path, name):
  files.write_rows(tmp_path / name, ROWS)
  pruned = lambda row: {k: v for k, v in row.items() if v is not None}
  assert [pruned(r.value) for r in records.read(tmp_path / name)] == ROWS
  if name.endswith("parquet"):
    assert pq.read_schema(tmp_path / name).names == [
        "id", "logprob", "num_tokens", "is_greedy", "token_ids", "token_logprobs", "perplexity", "choices"]


def test_the_store_keeps_where_scores_begin(tmp_path):
  row = parse({"prompt": "ab", "continuations": ["c", "d"]})
  ids = [np.array(x, np.int32) for x in ([1], [1, 2], [1, 3])]
  with RequestWriter(tmp_path / "store") as store:
    for part, tokens in scores.requests_of(row, ids, None):
      store.append(part, tokens)
  with RequestReader(tmp_path / "store") as store:
    stored = store.rows(0, 2)
  assert [r.request.sampling_params.prompt_logprobs_start for r in stored] == [1, 1]
  assert [(r.index, r.form, scores.row_id(r)) for r in stored] == [(0, "choices", "a")] * 2
