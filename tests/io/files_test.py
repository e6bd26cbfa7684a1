"""Output files: every format, whole or not at all, the same bytes every time."""

import gzip
import json
import os
import socket

import pyarrow.parquet as pq
import pytest

from batchjax.io import files
from batchjax.io.files import DamagedFile
from batchjax.io.records import InputError, read

PLAIN = [{"id": "a", "text": "é\u2028\n", "finish_reason": "stop", "usage": {"prompt_tokens": 2}},
         {"id": "b", "choices": [{"index": 0, "text": "x", "token_ids": [1, 2]}],
          "prompt_logprobs": [{"token_id": 1, "token": "t", "logprob": None},
                              {"token_id": 2, "token": "u", "logprob": -0.5, "top_logprobs": [
                                  {"token_id": 3, "token": "v", "logprob": -0.25}]}]}]
BATCH = [{"id": "i", "custom_id": "c", "error": None, "response": {
    "status_code": 200, "request_id": "r", "body": {
        "id": "j", "object": "text_completion", "created": 0, "model": "m",
        "choices": [{"index": 0, "text": "x", "finish_reason": "length", "logprobs": {
            "tokens": ["a"], "token_logprobs": [None], "top_logprobs": [None, {"b": -1.0}],
            "text_offset": [0]}}]}}}]
ERROR = [{"id": "i", "custom_id": None,
          "error": {"code": "c", "message": "m", "param": None, "row": 3},
          "response": {"status_code": 400, "request_id": "r", "body": {"error": {"code": "c"}}}}]


def pruned(value):
  """Without the nulls that a Parquet column shows for absent fields."""
  if isinstance(value, dict):
    return {k: pruned(v) for k, v in value.items() if v is not None}
  return [pruned(v) for v in value] if isinstance(value, list) else value


@pytest.mark.parametrize("name", ["o.jsonl", "o.jsonl.gz", "o.parquet"])
@pytest.mark.parametrize("rows", [PLAIN, BATCH, ERROR, PLAIN + BATCH, BATCH * 3000])
def test_round_trip_and_equal_bytes(tmp_path, name, rows):
  files.write_rows(tmp_path / name, rows)
  first = (tmp_path / name).read_bytes()
  assert pruned([record.value for record in read(tmp_path / name)]) == pruned(rows)
  files.write_rows(tmp_path / name, iter(rows) if "jsonl" in name else rows)
  assert (tmp_path / name).read_bytes() == first
  assert os.listdir(tmp_path) == [name]


def test_jsonl_is_one_compact_object_per_line(tmp_path):
  files.write_rows(tmp_path / "o.jsonl", PLAIN[:1])
  assert (tmp_path / "o.jsonl").read_text("utf-8") == (
      '{"id":"a","text":"é\u2028\\n","finish_reason":"stop","usage":{"prompt_tokens":2}}\n')


def test_gzip_header_holds_no_time_and_no_name(tmp_path):
  files.write_rows(tmp_path / "o.jsonl.gz", PLAIN)
  data = (tmp_path / "o.jsonl.gz").read_bytes()
  assert data[3] == 0 and data[4:8] == bytes(4)
  assert json.loads(gzip.decompress(data).splitlines()[0]) == PLAIN[0]


def test_no_rows(tmp_path):
  for name in ("o.jsonl", "o.jsonl.gz", "o.parquet"):
    files.write_rows(tmp_path / name, [])
  assert (tmp_path / "o.jsonl").read_bytes() == b""
  assert gzip.decompress((tmp_path / "o.jsonl.gz").read_bytes()) == b""
  assert pq.read_table(tmp_path / "o.parquet").num_rows == 0


def test_plain_parquet_has_plain_columns(tmp_path):
  files.write_rows(tmp_path / "o.parquet", PLAIN)
  assert pq.read_schema(tmp_path / "o.parquet").names == [
      "id", "text", "finish_reason", "token_ids", "logprobs", "choices", "prompt_logprobs", "usage"]


@pytest.mark.parametrize("name", ["o.jsonl", "o.jsonl.gz", "o.parquet"])
def test_a_failure_keeps_the_old_file_and_no_other(tmp_path, name):
  (tmp_path / name).write_bytes(b"old")
  with pytest.raises((ValueError, TypeError)):
    files.write_rows(tmp_path / name, [PLAIN[0], PLAIN[0] | {"usage": float("nan")}])
  assert (tmp_path / name).read_bytes() == b"old"
  assert os.listdir(tmp_path) == [name]


def test_check_output(tmp_path):
  (tmp_path / "d.jsonl").mkdir()
  for path, told in [(tmp_path / "o.txt", "must be one of"), ("no://b/o.jsonl", "begin with 'no://'"),
                     (tmp_path / "d.jsonl", "is a directory"),
                     (tmp_path / "no" / "o.jsonl", "its directory does not exist")]:
    with pytest.raises(InputError, match=told) as e:
      files.check_output(path)
    assert str(path) in str(e.value)
  files.check_output(tmp_path / "o.jsonl")


def test_sealed_objects_come_back_or_are_damaged(tmp_path):
  path, values = tmp_path / "s.json", {"a": [1, 0.1, "\u00e9\ud800"], "b": {"c": None}}
  files.write_sealed(path, values)
  assert files.read_sealed(path, "a", "b") == values
  whole = path.read_bytes()
  json.loads(whole)
  for at in range(8 * len(whole)):
    data = bytearray(whole)
    data[at // 8] ^= 1 << at % 8
    path.write_bytes(data)
    try:  # white space may change, and a character that JSON spells in two ways
      assert files.read_sealed(path, "a", "b") == values
    except DamagedFile as e:
      assert str(path) in str(e)
  for data in (whole[:-9], b"", b"[" * 10**5, b"[]", b"null"):
    path.write_bytes(data)
    with pytest.raises(DamagedFile, match="s.json is damaged"):
      files.read_sealed(path, "a", "b")
  path.write_bytes(whole)
  with pytest.raises(DamagedFile, match="its fields do not fit"):
    files.read_sealed(path, "a")
  path.unlink()
  with pytest.raises(DamagedFile, match="s.json is missing"):
    files.read_sealed(path, "a", "b")


def test_only_files_are_opened(tmp_path, monkeypatch):
  (tmp_path / "f").write_text("x")
  with open(tmp_path / "f", opener=files.open_regular) as f:
    assert f.read() == "x"
  (tmp_path / "link").symlink_to("f")
  (tmp_path / "loop").symlink_to("loop")
  (tmp_path / "d").mkdir()
  os.mkfifo(tmp_path / "p")
  with socket.socket(socket.AF_UNIX) as s:
    monkeypatch.chdir(tmp_path)  # the path of a socket may not be long
    s.bind("s")
  for name, kind in (("link", "a symbolic link"), ("loop", "a symbolic link"), ("d", "a directory"),
                     ("p", "a pipe"), ("s", "a socket")):
    with pytest.raises(files.NotRegular, match=f"{name} is {kind}, .*: remove it"):
      files.open_regular(tmp_path / name)
  with pytest.raises(files.NotRegular, match="null is a device"):
    files.open_regular("/dev/null")
  with pytest.raises(FileNotFoundError):
    files.open_regular(tmp_path / "none")


def test_a_link_that_comes_between_look_and_open_is_not_followed(tmp_path, monkeypatch):
  (tmp_path / "f").write_text("x")
  (tmp_path / "link").symlink_to("f")
  monkeypatch.setattr(files, "check_regular", lambda path: None)
  with pytest.raises(OSError, match="Too many levels of symbolic links"):
    files.open_regular(tmp_path / "link")
  os.mkfifo(tmp_path / "p")
  with pytest.raises(files.NotRegular, match="p was replaced while it was opened"):
    files.open_regular(tmp_path / "p")
