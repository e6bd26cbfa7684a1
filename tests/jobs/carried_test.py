"""Fields beside a request, from the input of a job to its output and its error file."""

import json

import pyarrow.parquet as pq
import pytest

from batchjax.jobs.job import JobError
from batchjax.jobs.signals import Interrupted
from tests.jobs import fake_folder

ROWS = [
    {"id": "a", "prompt": "x", "max_tokens": 2, "label": "pos", "metadata": {"k": [1, None]}},
    {"custom_id": "b", "method": "POST", "url": "/v1/completions",
     "body": {"prompt": "y", "max_tokens": 2, "metadata": {"k": "v"}}},
    {"id": "c", "prompt": "x", "max_tokens": -1, "label": "neg", "answer": 3},
    {"id": "d", "prompt": "x", "max_tokens": 2},
    {"custom_id": "e", "method": "POST", "url": "/v1/completions",
     "body": {"prompt": "y", "max_tokens": -2, "metadata": {"k": "w"}}},
    {"id": "f", "prompt": "x", "max_tokens": 2, "label": None, "text": "taken"},
    {"id": "g", "prompt": "z", "max_tokens": 2, "n": 2, "label": None},
]


def write(folder, rows=ROWS):
  (folder / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def read(path):
  return {row.get("custom_id") or row["id"]: row
          for row in map(json.loads, path.read_text().splitlines())}


def test_they_come_out_as_they_went_in_bad_rows_too(tmp_path, caplog):
  write(tmp_path)
  with caplog.at_level("INFO"):
    fake_folder.run(tmp_path)
  assert "carried through to the output: label, metadata, answer" in caplog.text
  done, bad = read(tmp_path / "out.jsonl"), read(tmp_path / "out.errors.jsonl")
  assert list(done["a"]) == ["id", "text", "finish_reason", "usage", "label", "metadata"]
  assert (done["a"]["label"], done["a"]["metadata"]) == ("pos", {"k": [1, None]})
  assert done["b"]["response"]["body"]["metadata"] == {"k": "v"}
  assert not {"label", "metadata"} & set(done["d"]) and done["g"]["label"] is None
  assert (bad["c"]["label"], bad["c"]["answer"]) == ("neg", 3)
  assert bad["e"]["response"]["body"]["metadata"] == {"k": "w"}
  assert bad["f"]["error"]["message"].startswith("text is a field of the output") and "text" not in bad["f"]


@pytest.mark.parametrize("output", ["out.jsonl", "out.parquet"])
def test_a_stopped_job_writes_the_same_bytes(tmp_path, output):
  folders = [tmp_path / "straight", tmp_path / "stopped"]
  for folder in folders:
    folder.mkdir()
    write(folder)
  fake_folder.run(folders[0], output=output)
  for after in (1, 2):
    with pytest.raises(Interrupted):
      fake_folder.run(folders[1], output=output, stop_after=after)
  fake_folder.run(folders[1], output=output)
  suffix = output.removeprefix("out")
  for name in (output, f"out.errors{suffix}"):
    assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes()


def test_parquet_has_a_column_for_each(tmp_path):
  write(tmp_path)
  fake_folder.run(tmp_path, output="out.parquet")
  done = {row["id"] if row["custom_id"] is None else row["custom_id"]: row
          for row in pq.read_table(tmp_path / "out.parquet").to_pylist()}
  assert (done["a"]["label"], json.loads(done["a"]["metadata"])) == ("pos", {"k": [1, None]})
  assert json.loads(done["b"]["response"]["body"]["metadata"]) == {"k": "v"}
  bad = {row["custom_id"]: row for row in pq.read_table(tmp_path / "out.errors.parquet").to_pylist()}
  assert (bad["c"]["label"], bad["c"]["answer"]) == ("neg", 3)


def test_an_input_that_changed_meanwhile_is_refused_and_the_rows_kept(tmp_path, monkeypatch):
  write(tmp_path)
  real = fake_folder.complete
  monkeypatch.setattr(fake_folder, "complete", lambda request: (
      write(tmp_path, [ROWS[0] | {"label": "other"}, *ROWS[1:]]), real(request))[1])
  with pytest.raises(JobError, match="in.jsonl was changed while the job ran.*: put back what it was"):
    fake_folder.run(tmp_path)
  assert not (tmp_path / "out.jsonl").exists()
  write(tmp_path)
  monkeypatch.setattr(fake_folder, "complete", None)  # no row runs again
  fake_folder.run(tmp_path)
  assert read(tmp_path / "out.jsonl")["a"]["label"] == "pos"


def test_a_limit_holds_for_them_too(tmp_path):
  write(tmp_path)
  fake_folder.run(tmp_path, limit=1)
  assert list(read(tmp_path / "out.jsonl")) == ["a"]
  assert read(tmp_path / "out.jsonl")["a"]["label"] == "pos"


@pytest.mark.parametrize("depth", [900, 930, 950, 970, 990, 1000, 5000])
def test_what_is_nested_deeply_ends_no_job(tmp_path, depth):
  rows = [json.dumps(ROWS[0]), '{"id": "deep", "prompt": "x", "max_tokens": 1, "label": %s}' % (
      "[" * depth + "]" * depth)]
  (tmp_path / "in.jsonl").write_text("\n".join(rows))
  finished = fake_folder.run(tmp_path)
  assert finished.num_outputs + finished.num_errors == 2 and finished.num_outputs >= 1
  if finished.num_outputs == 2:
    assert "[" * depth in (tmp_path / "out.jsonl").read_text()
