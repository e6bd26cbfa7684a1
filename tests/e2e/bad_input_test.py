"""What a user reads about bad input: each row's own error, told before the model loads."""

import gzip
import json
import os
import re

import fake_job
import pytest

from batchjax.config import ConfigError
from batchjax.io.records import InputError
from batchjax.jobs.prepare import BadRow
from batchjax.jobs.run import run as run_file

# The context of the fake model is 128 tokens and its vocabulary 97; the pool below holds 96.
BAD_ROWS = [
    ("malformed JSON", b'{"id": "a", "prompt": "x"', None, "",
     r"the line is not valid JSON at column 26 .*one JSON object on one line"),
    ("not an object", b'["x"]', None, "", r"the line holds a list, not an object"),
    ("invalid UTF-8", b'{"id": "b", "prompt": "\xff"}', None, "",
     r"byte 24 of the line is not valid UTF-8: save the file as UTF-8"),
    ("wrong type", b'{"id": "c", "prompt": 5}', "c", "prompt",
     r"prompt must be a string or a list of token ids, got 5"),
    ("wrong type of a setting", b'{"id": "d", "prompt": "x", "n": "2"}', "d", "n",
     r"n must be an integer of at least 1, got '2'"),
    ("NaN temperature", b'{"id": "e", "prompt": "x", "temperature": NaN}', "e", "temperature",
     r"temperature must be a finite number, got nan"),
    ("unknown model", b'{"id": "f", "prompt": "x", "model": "gpt-9"}', "f", "model",
     r"model is 'gpt-9', but this job runs 'fake'"),
    ("duplicate id", b'{"id": "good", "prompt": "again"}', "good", "id",
     r"id 'good' is used by an earlier row: make it unique"),
    ("empty prompt", b'{"id": "g", "prompt": ""}', "g", "prompt", r"prompt is empty"),
    ("no prompt", b'{"id": "h"}', "h", "prompt",
     r"the row has no prompt or messages or prompt_token_ids: give it one"),
    ("too long a prompt", b'{"id": "i", "prompt": "%s"}' % (b"x" * 128), "i", "prompt",
     r"the prompt has 128 tokens, which leaves no room in the context of 128: .* at most 127"),
    ("over the context", b'{"id": "j", "prompt": "%s", "max_tokens": 50}' % (b"x" * 100), "j",
     "max_tokens", r"100 tokens and max_tokens is 50, together over .* 128: .* at most 28"),
    ("token out of range", b'{"id": "k", "prompt_token_ids": [3, 97]}', "k", "prompt",
     r"prompt token 1 is 97, but the model's vocabulary has 97 tokens: use the model's own"),
    ("negative token", b'{"id": "l", "prompt_token_ids": [-1]}', "l", "prompt_token_ids[0]",
     r"prompt_token_ids\[0\] must be a token id, an integer of at least 0, got -1"),
    ("unknown field", b'{"id": "m", "prompt": "x", "temprature": 0}', "m", "temprature",
     r"temprature is not a field of this row: did you mean temperature\?"),
    ("over the KV pool", b'{"id": "n", "prompt": "%s", "max_tokens": 90}' % (b"x" * 20), "n",
     "max_tokens", r"20 prompt tokens and max_tokens=90 need up to 31 KV pages of 4 tokens, "
     r"the pool has 24: shorten them, or raise engine.kv_memory_bytes or engine.num_pages"),
    ("messages without a template", b'{"id": "o", "messages": [{"role": "user", "content": "x"}]}',
     "o", "messages", r"the model has no chat template: give a prompt, or set chat_template"),
    ("stop token out of range", b'{"id": "p", "prompt": "x", "stop_token_ids": [97]}', "p",
     "stop_token_ids", r"stop_token_ids names token 97"),
    ("stop string that is too long", b'{"id": "s", "prompt": "x", "stop": "%s"}' % (b"y" * 2000), "s",
     "stop", r"2000 characters are more than limits.max_stop_chars=1024: use fewer, or raise"),
    ("too many samples", b'{"id": "t", "prompt": "x", "n": 1000000000}', "t", "n",
     r"1000000000 samples are more than limits.max_n=10000: use fewer, or raise the limit"),
    ("digits without end", b'{"id": "u", "prompt": "x", "logit_bias": {"%s": 1}}' % (b"1" * 5000),
     "u", "logit_bias", r"logit_bias must be keyed by token ids written as strings"),
    ("batch line without a body", b'{"custom_id": "q", "method": "POST", "url": "/v1/completions"}',
     "q", "body", r"body is missing: a batch line has custom_id, method, url and body"),
    ("batch line without an id", b'{"method": "POST", "url": "/v1/completions", "body": {}}',
     None, "custom_id", r"custom_id is missing: give each request a unique one"),
    ("wrong url", b'{"custom_id": "r", "method": "POST", "url": "/v1/embeddings", "body": {}}',
     "r", "url", r"url must be /v1/chat/completions or /v1/completions, got \"/v1/embeddings\""),
]
GOOD_ROW = b'{"id": "good", "prompt": "hello", "max_tokens": 3}'


def no_model(source):
  raise AssertionError("the model was loaded")


def small_config(**fields):
  config = fake_job.config(num_pages=24, max_rows=2, max_step_tokens=32)
  values = {"model": config.model.__class__(path=os.devnull, name="fake")} | fields
  return config.__class__(**vars(config) | values)


def run(tmp_path, data, config=None, name="in.jsonl", model_fn=no_model):
  (tmp_path / name).write_bytes(data)
  return run_file(config or small_config(), str(tmp_path / name), str(tmp_path / "out.jsonl"),
                    quiet=True, loaders=fake_job.fake_loaders(model_fn=model_fn))


def errors_of(tmp_path):
  return [json.loads(line) for line in (tmp_path / "out.errors.jsonl").read_bytes().splitlines()]


def test_every_bad_row_is_one_error_row_and_the_good_one_is_done(tmp_path):
  data = b"\n".join([GOOD_ROW, *(row for _, row, *_ in BAD_ROWS)])
  finished = run(tmp_path, data, model_fn=None)
  assert (finished.num_outputs, finished.num_errors) == (1, len(BAD_ROWS))
  output = [json.loads(line) for line in (tmp_path / "out.jsonl").read_bytes().splitlines()]
  assert [row["id"] for row in output] == ["good"]
  assert output[0]["usage"]["completion_tokens"] == 3
  for (name, _, request_id, field, message), error in zip(BAD_ROWS, errors_of(tmp_path),
                                                          strict=True):
    row = 2 + [case[0] for case in BAD_ROWS].index(name)
    assert re.search(message, error["error"]["message"]), (name, error["error"]["message"])
    assert (error["custom_id"], error["error"]["param"], error["error"]["row"]) == (
        request_id, field or None, row), name
    assert error["response"]["status_code"] == 400


def test_all_rows_bad_needs_no_model(tmp_path):
  data = b"\n".join(row for name, row, *_ in BAD_ROWS if name != "duplicate id")
  finished = run(tmp_path, data)
  assert (finished.num_outputs, finished.num_errors) == (0, len(BAD_ROWS) - 1)
  assert (tmp_path / "out.jsonl").read_bytes() == b""
  assert len(errors_of(tmp_path)) == len(BAD_ROWS) - 1
  assert run(tmp_path, data).was_finished


@pytest.mark.parametrize("name, row, request_id, field, message", [
    pytest.param(*case, id=case[0]) for case in BAD_ROWS])
def test_strict_stops_at_the_row_and_runs_once_it_is_corrected(tmp_path, name, row, request_id,
                                                               field, message):
  data = GOOD_ROW + b"\n\n" + row + b"\n" + b'{"id": "z"}'
  with pytest.raises(BadRow, match=message) as error:
    run(tmp_path, data, small_config(strict=True))
  assert str(error.value).startswith(f"row 3 ({request_id}): " if request_id else "row 3: ")
  assert {path.name for path in tmp_path.iterdir()} == {"in.jsonl"}  # no job was begun


def test_a_corrected_file_is_not_refused(tmp_path):
  with pytest.raises(BadRow):
    run(tmp_path, GOOD_ROW + b"\n{}", small_config(strict=True))
  assert run(tmp_path, GOOD_ROW, small_config(strict=True), model_fn=None).num_outputs == 1


@pytest.mark.parametrize("name, data, message", [
    ("in.jsonl", b"", r"in.jsonl is empty: write at least one request into it"),
    ("in.jsonl", b"\n \n", r"in.jsonl holds no rows: write at least one request into it"),
    ("in.jsonl.gz", b"plain text", r"in.jsonl.gz is not a whole gzip file"),
    ("in.jsonl.gz", gzip.compress(GOOD_ROW * 999)[:-9], r"not a whole gzip file .*compress it"),
    ("in.parquet", b"PAR1", r"in.parquet is not a whole Parquet file .*write it again"),
    ("in.csv", b"a,b", r"the format is told by the ending, .*\.jsonl, \.jsonl\.gz, \.parquet"),
])
def test_an_unreadable_file_says_so_and_leaves_nothing(tmp_path, name, data, message):
  with pytest.raises(InputError, match=message):
    run(tmp_path, data, name=name)
  assert {path.name for path in tmp_path.iterdir()} == {name}


def run_paths(tmp_path, input_path="in.jsonl", output_path="out.jsonl", error_path=None):
  paths = [path and str(tmp_path / path) for path in (input_path, output_path, error_path)]
  run_file(small_config(), *paths[:2], error_path=paths[2], quiet=True,
             loaders=fake_job.fake_loaders(model_fn=no_model))


@pytest.mark.parametrize("paths, message", [
    (dict(input_path="none.jsonl"), r"none.jsonl does not exist: check the path"),
    (dict(input_path="d.jsonl"), r"d.jsonl is a directory: name one file in it"),
    (dict(output_path="d.jsonl"), r"d.jsonl is a directory: name the file to write"),
    (dict(output_path="no/out.jsonl"), r"no/out.jsonl: its directory does not exist; make it"),
    (dict(output_path="in.jsonl/out.jsonl"), r"its directory does not exist"),
    (dict(output_path="out.txt"), r"out.txt: the format is told by the ending"),
    (dict(error_path="no/err.jsonl"), r"no/err.jsonl: its directory does not exist"),
    (dict(output_path="in.jsonl"), r"'output': .* name one file twice: give each its own"),
    (dict(error_path="d.jsonl/../out.jsonl"), r"name one file twice"),
])
def test_bad_paths(tmp_path, paths, message):
  (tmp_path / "in.jsonl").write_bytes(GOOD_ROW)
  (tmp_path / "d.jsonl").mkdir()
  with pytest.raises(InputError, match=message):
    run_paths(tmp_path, **paths)
  assert {path.name for path in tmp_path.iterdir()} == {"in.jsonl", "d.jsonl"}
  assert (tmp_path / "in.jsonl").read_bytes() == GOOD_ROW


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_output_directory_without_permission(tmp_path):
  (tmp_path / "in.jsonl").write_bytes(GOOD_ROW)
  (tmp_path / "locked").mkdir(mode=0o500)
  with pytest.raises(InputError, match="locked/out.jsonl cannot be written"):
    run_paths(tmp_path, output_path="locked/out.jsonl")


@pytest.mark.parametrize("template, message", [
    (b"{% if %}", r"the chat template is not valid at line 1"), (None, r"is not there")])
def test_bad_chat_template(tmp_path, template, message):
  if template:
    (tmp_path / "t.jinja").write_bytes(template)
  with pytest.raises(ConfigError, match=r"chat_template=.*" + message):
    run(tmp_path, GOOD_ROW, small_config(chat_template=str(tmp_path / "t.jinja")))
  assert not (tmp_path / "out.jsonl.job").exists()
