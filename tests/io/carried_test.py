"""What rows hold beside their requests: which fields, what may not be, and how it comes into the output."""

import datetime
import json

from hypothesis import given, settings, strategies as st
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from batchjax.config import RowLimits
from batchjax.io import carried, files, records, validate
from batchjax.io.fields import InvalidField
from batchjax.io.records import Record
from batchjax.types import SamplingParams

JSON = st.recursive(st.none() | st.booleans() | st.integers(-2**70, 2**70) | st.text()
                    | st.floats(allow_nan=False, allow_infinity=False),
                    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3))
LABELS = {"label": "pos", "answer": 3, "prompt_id": "x", "model_id": "m", "score": 0.5, "idx": 1,
          "question": "?", "topic": None, "tags": ["a", {"b": None}], "metadata": {"k": 1}, "user": "u"}


def parse(value):
  return validate.parse(Record(0, 1, value), defaults=SamplingParams(), model_name="", job_seed=0)


def names(*rows, **limits):
  found = carried.Names(RowLimits(**limits))
  for value in rows:
    found.add(Record(0, 1, value))
  return found


def test_a_plain_row_carries_what_is_not_read():
  row = {"id": "a", "prompt": "x", "max_tokens": 2, "stop": None} | LABELS
  assert isinstance(parse(row), validate.Row)
  assert carried.of_row(row) == LABELS


def test_a_refused_field_is_not_carried():
  for name in ("max_token", "do_sample", "text", "max_new_tokens"):
    assert not isinstance(parse({"prompt": "x", name: 1}), validate.Row)
    assert carried.of_row({"prompt": "x", name: 1, "label": 2}) == {"label": 2}
  assert carried.of_row({"max_tokens" * 1000: 1}) == {"max_tokens" * 1000: 1}


def test_a_batch_line_carries_its_metadata_alone():
  line = {"custom_id": "a", "method": "POST", "url": "/v1/completions",
          "body": {"prompt": "x", "metadata": {"k": "v"}, "user": "u"}}
  assert carried.of_row(line) == {"metadata": {"k": "v"}}
  assert carried.of_row(line | {"body": "no object"}) == carried.of_row(line | {"label": 1, "body": None}) == {}


@pytest.mark.parametrize("value, told", [
    (float("nan"), "Out of range float"), ([{"a": float("inf")}], "Out of range float"),
    (b"\xff", "no value for a bytes"), (datetime.date(2026, 1, 2), None), (10**400, None)])
def test_what_json_cannot_hold_is_refused_before_anything_runs(value, told):
  row = {"prompt": "x", "label": value}
  if told is None:
    names(row).check(Record(0, 1, row))
  else:
    with pytest.raises(InvalidField, match=f"^label is carried .*{told}.*: write it as text"):
      names(row).check(Record(0, 1, row))


def test_names_are_bounded():
  rows = [{f"field{i}": i} for i in range(1001)] + [{"x" * 30: 1}]
  found = names(*rows, max_name_chars=20)
  assert list(found) == [f"field{i}" for i in range(1000)]
  found.check(Record(0, 1, rows[999]))
  with pytest.raises(InvalidField, match="^field1000: the rows of a job may have 1000 different"):
    found.check(Record(0, 1, rows[1000]))


class Rows(list):
  """Objects as those of a journal."""

  def __init__(self, rows, indices):
    super().__init__(rows)
    self.indices = indices


def joined(path, rows, indices, found, **kwargs):
  source = carried.Carried(path, list(found), 1 << 20, **kwargs)
  return source.join(Rows(rows, indices)), source.types


@settings(max_examples=40, deadline=None)
@given(st.lists(st.dictionaries(st.sampled_from(["label", "metadata", "tags", "n_words"]), JSON), min_size=1,
                max_size=6), st.data())
def test_any_values_come_back_from_every_format(tmp_path_factory, fields, data):
  folder = tmp_path_factory.mktemp("any")
  rows = [{"id": str(i), "prompt": "x"} | value for i, value in enumerate(fields)]
  (folder / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
  indices = sorted(data.draw(st.sets(st.integers(0, len(rows) - 1), min_size=1)))
  objects = [{"id": str(i), "text": "y", "usage": None} for i in indices]
  for ending in (".jsonl", ".parquet"):
    files.write_rows(folder / f"out{ending}", *joined(folder / "in.jsonl", objects, indices, names(*rows)))
  lines = [json.loads(line) for line in (folder / "out.jsonl").read_text().split("\n")[:-1]]
  assert lines == [row | fields[i] for i, row in zip(indices, objects)]
  columns = pq.read_table(folder / "out.parquet").to_pylist()
  for i, row in zip(indices, columns):
    assert row["text"] == "y" and row["id"] == str(i)
    for name, value in fields[i].items():
      is_json = type(row[name]) is str and (type(value) is not str or row[name] != value)
      assert (json.loads(row[name]) if is_json else row[name]) == value


def test_columns_of_a_parquet_file_keep_their_types(tmp_path):
  table = pa.table({
      "prompt": ["x"] * 3, "when": pa.array([datetime.datetime(2026, 1, 2, 3), None, None], pa.timestamp("ms")),
      "small": pa.array([1, None, 3], pa.int8()), "tags": [["a"], [], None],
      "shape": pa.array([{"w": 1, "h": None}] * 3, pa.struct({"w": pa.int16(), "h": pa.string()})),
      "kind": pa.array(["u", "v", "u"]).dictionary_encode()})
  pq.write_table(table, tmp_path / "in.parquet")
  rows = [record.value for record in records.read(tmp_path / "in.parquet")]
  objects = [{"id": str(i), "text": "y"} for i in range(3)]
  for ending in (".parquet", ".jsonl"):
    files.write_rows(tmp_path / f"out{ending}", *joined(tmp_path / "in.parquet", objects, range(3), names(*rows)))
  extra = [name for name in table.column_names if name != "prompt"]
  found = pq.read_table(tmp_path / "out.parquet").select(extra)
  assert found.to_pylist() == table.select(extra).to_pylist()
  assert {name: found.schema.field(name).type for name in extra} == {
      name: table.schema.field(name).type for name in extra}
  first = json.loads((tmp_path / "out.jsonl").read_text().splitlines()[0])
  assert first == {"id": "0", "text": "y", "when": "2026-01-02T03:00:00", "small": 1, "tags": ["a"],
                   "shape": {"w": 1}, "kind": "u"}


def test_columns_of_several_kinds_are_json_text(tmp_path):
  rows = [{"prompt": "x", "a": 1, "b": 1, "c": "t", "d": 2**60, "e": True, "f": {"k": 1}},
          {"prompt": "x", "a": 2.5, "b": "1", "c": None, "d": 1, "e": False, "f": None}]
  (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
  files.write_rows(tmp_path / "out.parquet", *joined(
      tmp_path / "in.jsonl", [{"id": "0"}, {"id": "1"}], range(2), names(*rows)))
  found = pq.read_table(tmp_path / "out.parquet").select(list("abcdef"))
  assert [str(kind) for kind in found.schema.types] == ["double", "string", "string", "int64", "bool", "string"]
  assert found.to_pylist() == [{"a": 1.0, "b": "1", "c": "t", "d": 2**60, "e": True, "f": '{"k":1}'},
                               {"a": 2.5, "b": '"1"', "c": None, "d": 1, "e": False, "f": None}]
