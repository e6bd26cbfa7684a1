"""Every form of a row and every file format, through a tiny model from text to text."""

import dataclasses
import gzip
import json
import math
import runpy

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from batchjax.config import JobConfig, from_config_dict
from batchjax.io import records
from batchjax.jobs.run import run as run_file
from batchjax.text.tokenizer import load_tokenizer

PREFIX = "Read the question and answer it as well as you can: "


def batch(name, url, **body):
  return {"custom_id": name, "method": "POST", "url": f"/v1/{url}", "body": body}


ROWS = [
    batch("chat", "chat/completions", messages=[{"role": "user", "content": "Hi there"}],
          max_tokens=6, logprobs=True, top_logprobs=2),
    {"id": "plain", "prompt": PREFIX + "one", "max_tokens": 5, "return_token_ids": True},
    batch("completion", "completions", prompt=PREFIX + "two", max_tokens=4, echo=True, logprobs=1),
    {"id": "ids", "prompt_token_ids": [1, 40, 41, 42], "max_tokens": 3},
    batch("samples", "completions", prompt=PREFIX + "three", n=3, temperature=1.5, seed=7,
          max_tokens=8),
    {"id": "bad", "prompt": "x", "max_tokens": 999},
    {"id": "plain chat", "messages": [{"role": "user", "content": "the café"}], "n": 2,
     "temperature": 0.8, "max_tokens": 5},
    {"id": "scored", "prompt": PREFIX + "one", "prompt_logprobs": True, "max_tokens": 1},
    {"id": "same", "prompt": PREFIX + "one", "max_tokens": 5, "return_token_ids": True},
    {"id": "whole", "prompt": PREFIX + "four", "temperature": 1.2, "seed": 3, "max_tokens": 24,
     "ignore_eos": True},
    {"id": "seeded", "prompt": PREFIX + "three", "temperature": 1.5, "seed": 7, "max_tokens": 8},
]


@pytest.fixture(scope="module")
def config(tiny_config) -> JobConfig:
  return from_config_dict(JobConfig, runpy.run_path(str(tiny_config))["get_config"]())


@pytest.fixture(scope="module")
def tokenizer(tiny_model):
  return load_tokenizer(tiny_model)


def write(path, rows):
  text = "".join(json.dumps(row) + "\n" for row in rows)
  if path.suffix == ".parquet":
    pq.write_table(pa.Table.from_pylist(rows, _schema(rows)), path)
  elif path.suffix == ".gz":
    path.write_bytes(gzip.compress(text.encode()))
  else:
    path.write_text(text)


def _schema(rows):
  """All columns: `from_pylist` alone takes those of the first row."""
  return pa.unify_schemas([pa.Table.from_pylist([row]).schema for row in rows])


def run(folder, rows, config, suffix=".jsonl"):
  """Output rows of a job by id, in the order of the file."""
  write(folder / f"in{suffix}", rows)
  run_file(config, str(folder / f"in{suffix}"), str(folder / f"out{suffix}"), quiet=True)
  return {row.get("custom_id") or row["id"]: row for row in read(folder / f"out{suffix}")}


def read(path):
  return [_without_hashes(record.value) for record in records.read(path)]


def _without_hashes(row):
  """Null fields and the ids that depend on the bytes of the input are left out."""
  if isinstance(row, list):
    return [_without_hashes(item) for item in row]
  if not isinstance(row, dict):
    return row
  return {name: _without_hashes(value) for name, value in row.items() if value is not None
          and not str(value).startswith(("batch_req_", "req_", "cmpl-", "chatcmpl-"))}


@pytest.fixture(scope="module")
def outputs(tmp_path_factory, config):
  return run(tmp_path_factory.mktemp("jsonl"), ROWS, config)


def body(row):
  assert row["response"]["status_code"] == 200
  return row["response"]["body"]


def test_output_is_in_input_order_and_the_bad_row_in_the_error_file(outputs):
  assert list(outputs) == [row.get("id") or row["custom_id"] for row in ROWS
                           if row.get("id") != "bad"]


def test_chat(outputs, tokenizer):
  answer = body(outputs["chat"])
  choice, = answer["choices"]
  assert answer["object"] == "chat.completion" and choice["message"]["role"] == "assistant"
  prompt = tokenizer.encode("<|user|>Hi there</s><|assistant|>", add_special_tokens=False)
  num_generated = answer["usage"]["completion_tokens"]
  assert answer["usage"]["prompt_tokens"] == len(prompt)
  assert answer["usage"]["total_tokens"] == len(prompt) + num_generated
  content = choice["logprobs"]["content"]
  assert len(content) == num_generated <= 6
  text = b"".join(bytes(token["bytes"]) for token in content).decode(errors="replace")
  assert choice["message"]["content"] == text
  for token in content:
    assert token["logprob"] <= 0 and len(token["top_logprobs"]) == 2
    best, second = token["top_logprobs"]
    assert token["logprob"] == best["logprob"] >= second["logprob"]  # temperature is 0


def test_completion_with_echo(outputs, tokenizer):
  answer = body(outputs["completion"])
  choice, = answer["choices"]
  assert answer["object"] == "text_completion"
  assert choice["text"].startswith(PREFIX + "two")
  logprobs = choice["logprobs"]
  assert len(logprobs["tokens"]) == answer["usage"]["total_tokens"]
  assert logprobs["token_logprobs"][0] is None  # nothing precedes it
  assert all(value < 0 for value in logprobs["token_logprobs"][1:])
  assert "".join(logprobs["tokens"][1:]).startswith(PREFIX + "two")


def test_plain_rows(outputs, tokenizer):
  row = outputs["plain"]
  assert row["text"] == tokenizer.decode(row["token_ids"], is_continuation=True)
  assert row["usage"]["completion_tokens"] == len(row["token_ids"])
  assert row["usage"]["prompt_tokens"] == len(tokenizer.encode(PREFIX + "one"))
  assert row["finish_reason"] in ("length", "stop")
  assert (row["finish_reason"] == "length") == (len(row["token_ids"]) == 5)
  assert outputs["ids"]["usage"]["prompt_tokens"] == 4
  assert outputs["same"]["token_ids"] == row["token_ids"]


def test_usage_shows_that_the_prefix_was_shared(outputs, tokenizer):
  cached = {name: (body(row) if "response" in row else row)["usage"]["prompt_tokens_details"][
      "cached_tokens"] for name, row in outputs.items()}
  prefix = len(tokenizer.encode(PREFIX))
  assert cached["plain"] == 0  # the first of those that share it
  assert min(cached[name] for name in ("completion", "samples", "same")) >= prefix - 1


def test_samples_are_numbered_and_follow_the_seed_alone(outputs):
  choices = body(outputs["samples"])["choices"]
  assert [choice["index"] for choice in choices] == [0, 1, 2]
  assert len({choice["text"] for choice in choices}) == 3  # at temperature 1.5
  assert outputs["seeded"]["text"] == choices[0]["text"]
  assert [choice["index"] for choice in outputs["plain chat"]["choices"]] == [0, 1]


def test_prompt_logprobs(outputs, tokenizer):
  scored = outputs["scored"]["prompt_logprobs"]
  assert [token["token_id"] for token in scored] == tokenizer.encode(PREFIX + "one")
  assert scored[0].get("logprob") is None
  assert all(-20 < token["logprob"] < 0 for token in scored[1:])


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".parquet"])
def test_other_formats_say_the_same(tmp_path, config, outputs, suffix):
  # In a Parquet file `logprobs` is of one type: that of chat or that of completions.
  rows = [row for row in ROWS if suffix != ".parquet" or row.get("custom_id") != "completion"]
  other = run(tmp_path, rows, config, suffix)
  assert list(other) == [name for name in outputs if suffix != ".parquet" or name != "completion"]
  for name, row in other.items():
    assert _rounded(row) == _rounded(outputs[name]), name
  errors = read(tmp_path / f"out.errors{suffix}")
  assert [error["custom_id"] for error in errors] == ["bad"]
  assert errors[0]["error"]["row"] == 1 + rows.index(ROWS[5])
  assert errors[0]["error"]["param"] == "max_tokens"


def _rounded(value):
  if isinstance(value, float):
    return round(value, 3)
  if isinstance(value, list):
    return [_rounded(item) for item in value]
  return {k: _rounded(v) for k, v in value.items()} if isinstance(value, dict) else value


@pytest.fixture(scope="module")
def cut_outputs(tmp_path_factory, config, outputs):
  """Row "whole" with stop strings out of its own text, and rows that leave all to defaults."""
  whole = outputs["whole"]["text"]
  assert len(whole) > 12
  rows = [ROWS[[row.get("id") for row in ROWS].index("whole")] | {"id": name, "stop": stop}
          for name, stop in {"two": ["never in it", whole[5:7]], "four": whole[8:12]}.items()]
  sampling = dataclasses.replace(config.sampling, max_tokens=2, logprobs=True)
  rows += [{"id": "defaults", "prompt": "x"}, {"id": "own", "prompt": "x", "max_tokens": 3}]
  return run(tmp_path_factory.mktemp("cut"), rows, dataclasses.replace(config, sampling=sampling))


def test_a_stop_string_ends_the_text_before_it(outputs, cut_outputs):
  whole = outputs["whole"]["text"]
  for name, stop in {"two": whole[5:7], "four": whole[8:12]}.items():
    row = cut_outputs[name]
    assert row["text"] == whole[:whole.index(stop)]
    assert row["finish_reason"] == "stop"
    assert row["usage"]["completion_tokens"] < outputs["whole"]["usage"]["completion_tokens"]


def test_what_a_row_leaves_out_is_the_configurations(cut_outputs):
  assert [len(cut_outputs[name]["logprobs"]) for name in ("defaults", "own")] == [2, 3]
  total = sum(token["logprob"] for token in cut_outputs["own"]["logprobs"])
  assert math.isfinite(total) and total < 0
