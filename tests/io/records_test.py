"""Reading rows: formats, damage, and what users are told."""

import collections
import decimal
import gzip
import itertools
import json
import tracemalloc

from hypothesis import given, settings, strategies as st
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from batchjax.io import json_rows, parquet_rows, records

ROWS = [{"id": "a", "prompt": "héllo\u2028"}, {"id": "b", "messages": [{"role": "user"}]}]


def write(tmp_path, name, data):
  path = tmp_path / name
  path.write_bytes(data)
  return path


def jsonl(rows):
  return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b""])
def test_jsonl_and_gzip_round_trip(tmp_path, end):
  data = end.join(jsonl([row]).rstrip() for row in ROWS) + end if end else jsonl(ROWS).rstrip()
  for path in (write(tmp_path, "in.jsonl", data),
               write(tmp_path, "in.jsonl.gz", gzip.compress(data))):
    got = list(records.read(path))
    assert [(r.index, r.row, r.value) for r in got] == [(0, 1, ROWS[0]), (1, 2, ROWS[1])]


def test_a_limit_ends_the_reading(tmp_path):
  path = write(tmp_path, "in.jsonl", jsonl(ROWS) + b"{damaged")
  for limit in (1, 2, 3, 9, None):
    assert [r.index for r in records.read(path, limit=limit)] == list(range(min(limit or 3, 3)))


def test_parquet_drops_nulls_at_every_depth(tmp_path):
  rows = [{"id": "a", "prompt": "x", "temperature": None, "messages": None},
          {"id": "b", "messages": [{"role": "user", "content": "q", "name": None},
                                   {"role": "user", "content": "q", "name": "n"}]}]
  path = tmp_path / "in.parquet"
  schema = pa.schema({"id": pa.string(), "prompt": pa.string(), "temperature": pa.float64(),
                      "messages": pa.list_(pa.struct({"role": pa.string(), "content": pa.string(),
                                                      "name": pa.string()})),
                      "logit_bias": pa.map_(pa.string(), pa.float64())})
  rows[1]["logit_bias"] = {"5": 1.0}
  pq.write_table(pa.Table.from_pylist(rows, schema), path)
  first, second = records.read(path)
  assert first.value == {"id": "a", "prompt": "x"}
  assert second.row == 2
  assert second.value["messages"][0] == {"role": "user", "content": "q"}
  assert second.value["logit_bias"] == {"5": 1.0}


def test_blank_lines_count_in_row_but_not_in_index(tmp_path):
  got = list(records.read(write(tmp_path, "in.jsonl", b'\n{"id":"a"}\n  \n\n{"id":"b"}\n\n')))
  assert [(r.index, r.row) for r in got] == [(0, 2), (1, 5)]


def test_byte_order_mark_is_skipped(tmp_path):
  [record] = records.read(write(tmp_path, "in.jsonl", b'\xef\xbb\xbf{"id":"a"}\n'))
  assert record.value == {"id": "a"}


@pytest.mark.parametrize("line, told", [
    (b'{"id": "a", }', "not valid JSON at column 1"),
    (b'{"id": "a"', "not valid JSON at column 11"),
    (b'{"id": "a"} {"id": "b"}', "not valid JSON at column 13"),
    (b'{"id": "\xff"}', "byte 9 of the line is not valid UTF-8: save the file as UTF-8"),
    (b'{"id": "\\ud800"}', "half of a surrogate pair"),
    (b'[1, 2]', "holds a list, not an object"),
    (b'"text"', "holds a string, not an object"),
    (b'17', "holds a number"),
    (b'true', "holds true or false"),
    (b'null', "holds null"),
    (b'{"a":' * 100_000, "nested too deeply"),
    (b'{"n": ' + b"9" * 5000 + b"}", "number that cannot be read"),
])
def test_a_bad_line_is_one_error_between_good_ones(tmp_path, line, told):
  path = write(tmp_path, "in.jsonl", b'{"id":"a"}\n' + line + b'\n{"id":"b"}\n')
  before, bad, after = records.read(path)
  assert (before.value, after.value) == ({"id": "a"}, {"id": "b"})
  assert told in bad.value.message
  assert ": " in bad.value.message  # what is wrong, then the remedy
  assert (bad.value.index, bad.value.row, bad.value.code) == (1, 2, "invalid_json")
  assert str(bad.value).startswith("row 2: ")


@pytest.mark.parametrize("chunk", [1, 3, 7, 1 << 18])
def test_lines_are_cut_where_they_end_and_long_ones_are_errors(tmp_path, monkeypatch, chunk):
  monkeypatch.setattr(json_rows, "_CHUNK_BYTES", chunk)
  fits, over = b'{"a":"' + b"x" * 12 + b'"}', b'{"a":"' + b"x" * 13 + b'"}'
  data = b"\r\n".join([fits, b"", over + over, fits]) + b"\n\n" + over
  for name, packed in (("in.jsonl", data), ("in.jsonl.gz", gzip.compress(data))):
    got = list(records.read(write(tmp_path, name, packed), max_row_bytes=len(fits) + 1))
    assert [(r.index, r.row, type(r.value)) for r in got] == [
        (0, 1, dict), (1, 3, records.RowError), (2, 4, dict), (3, 6, dict)]
    assert got[1].value.code == "limit_exceeded"
    assert "limits.max_line_bytes=21 bytes: shorten it, or raise" in got[1].value.message


def test_a_huge_line_in_a_small_file_is_never_held(tmp_path):
  path = tmp_path / "in.jsonl.gz"
  with gzip.open(path, "wb", 1) as f:
    f.write(b'{"id":"a"}\n{"id":"')
    for _ in range(64):
      f.write(b"x" * (1 << 20))
    f.write(b'"}\n{"id":"b"}\n')
  tracemalloc.start()
  got = [record.value for record in records.read(path, max_row_bytes=1 << 20)]
  _, peak = tracemalloc.get_traced_memory()
  tracemalloc.stop()
  assert (got[0], got[2]) == ({"id": "a"}, {"id": "b"}) and got[1].code == "limit_exceeded"
  assert peak < 8 << 20


def test_what_is_long_is_cut_out_of_the_middle_of_a_message():
  error = records.RowError(0, 1, "a", "f" * 5000, "begins " + "x" * 10**6 + ": remedy", "c")
  assert len(str(error)) < 1100 and len(error.field) < 1100
  assert "begins x" in error.message and error.message.endswith("x: remedy")


def test_an_escaped_surrogate_pair_is_whole(tmp_path):
  [record] = records.read(write(tmp_path, "in.jsonl", b'{"id": "\\ud83d\\ude00"}\n'))
  assert record.value == {"id": "😀"}


@pytest.mark.parametrize("name", ["in.json", "in.csv", "in.gz", "jsonl", "in"])
def test_unknown_suffix(tmp_path, name):
  with pytest.raises(records.InputError, match="must be one of .jsonl, .jsonl.gz, .parquet"):
    records.read(write(tmp_path, name, b"{}"))


def test_paths_that_cannot_be_read(tmp_path):
  (tmp_path / "dir.jsonl").mkdir()
  for name, told in [("no.jsonl", "does not exist"), ("dir.jsonl", "is a directory")]:
    with pytest.raises(records.InputError, match=told) as e:
      records.read(tmp_path / name)
    assert str(tmp_path / name) in str(e.value)
  with pytest.raises(records.InputError, match="use a local path, gs:// or s3://"):
    records.read("http://host/in.jsonl")


def test_empty_file_fails_at_once_and_blank_file_while_reading(tmp_path):
  with pytest.raises(records.InputError, match="is empty"):
    records.read(write(tmp_path, "in.jsonl", b""))
  with pytest.raises(records.InputError, match="holds no rows"):
    list(records.read(write(tmp_path, "in.jsonl", b"\n \n")))
  pq.write_table(pa.table({"id": pa.array([], pa.string())}), tmp_path / "in.parquet")
  with pytest.raises(records.InputError, match="holds no rows"):
    list(records.read(tmp_path / "in.parquet"))


@pytest.mark.parametrize("damage", [lambda data: data[:-20], lambda data: data[:30] + b"\0" * 40,
                                    lambda data: b"plain text"])
def test_damaged_gzip_names_the_file(tmp_path, damage):
  data = gzip.compress(jsonl(ROWS * 50), mtime=0)
  with pytest.raises(records.InputError, match="in.jsonl.gz is not a whole gzip file"):
    list(records.read(write(tmp_path, "in.jsonl.gz", damage(data))))


def test_damaged_parquet_names_the_file(tmp_path):
  with pytest.raises(records.InputError, match="in.parquet is not a whole Parquet file"):
    list(records.read(write(tmp_path, "in.parquet", b"PAR1 no")))


HUGE = 2**62  # microseconds past any date that Python has
GOOD = {"id": "g", "t": 0, "text": b"good", "map": [("a", 1.0)]}
COLUMNS = {"id": pa.string(), "t": pa.timestamp("us"), "text": pa.string(),
           "map": pa.map_(pa.string(), pa.float64())}


def parquet(path, rows):
  """Rows as Arrow holds them, whether Python could or not."""
  columns = [pa.array([row[name] for row in rows], storage).view(kind)
             for (name, kind), storage in zip(COLUMNS.items(), (
                 pa.string(), pa.int64(), pa.binary(), COLUMNS["map"]))]
  pq.write_table(pa.table(columns, names=list(COLUMNS)), path)


@pytest.mark.parametrize("field, value, told", [
    ("t", HUGE, "column t holds what cannot be read (OverflowError: "),
    ("text", b"\xff\xfe", "column text holds what cannot be read (UnicodeDecodeError: "),
    ("map", [("a", 1.0), ("b", 2.0), ("a", 3.0)], "column map holds what cannot be read (KeyError: "),
    ("text", b"x" * 2000, "the row has more than limits.max_line_bytes=1500 bytes: shorten it")])
def test_a_bad_parquet_row_is_one_error_between_good_ones(tmp_path, field, value, told):
  parquet(tmp_path / "in.parquet", [GOOD, GOOD | {"id": "bad", field: value}, GOOD])
  before, bad, after = records.read(tmp_path / "in.parquet", max_row_bytes=1500)
  assert before.value == after.value and before.value["map"] == {"a": 1.0}
  assert (bad.index, bad.row) == (1, 2) and told in bad.value.message
  assert bad.value.field == ("" if "max_line" in told else field)
  assert bad.value.request_id == (None if "max_line" in told else "bad")


def test_parquet_values_are_those_of_json(tmp_path):
  D = decimal.Decimal
  columns = {"text": pa.array([b"\xc3\xa9", b"\xff"]), "int": pa.array([D("7.0"), D("3")]),
             "big": pa.array([D("9007199254740993"), D("1")]), "float": pa.array([D("0.5"), D("1.5")]),
             "deep": pa.array([[{"a": [b"x"], "b": None}], []])}
  pq.write_table(pa.table(columns), tmp_path / "in.parquet")
  first, second = records.read(tmp_path / "in.parquet")
  assert first.value == {"text": "é", "int": 7, "big": 9007199254740993, "float": 0.5,
                         "deep": [{"a": ["x"]}]}
  assert type(first.value["int"]) is int and second.value.field == "text"


def test_a_value_that_stands_once_in_the_file_is_not_decoded_for_many_rows(tmp_path, monkeypatch):
  monkeypatch.setattr(parquet_rows, "_BATCH_BYTES", 1 << 20)
  text = "x" * 300_000
  pq.write_table(pa.table([[text] * 300], names=["prompt"]), tmp_path / "in.parquet")
  peak = pa.total_allocated_bytes()
  for count, record in enumerate(records.read(tmp_path / "in.parquet"), start=1):
    peak = max(peak, pa.total_allocated_bytes())
    assert record.value == {"prompt": text}
  assert count == 300 and peak < 30 * len(text)


def test_columns_of_one_name_are_refused(tmp_path):
  pq.write_table(pa.table([["a"], ["b"]], names=["id", "id"]), tmp_path / "in.parquet")
  with pytest.raises(records.InputError, match="two columns have the name 'id'"):
    list(records.read(tmp_path / "in.parquet"))


@settings(max_examples=150, deadline=None)
@given(name=st.sampled_from(["in.parquet", "in.jsonl.gz"]), data=st.data())
def test_a_file_with_flipped_bytes_has_its_rows_or_is_refused(tmp_path_factory, name, data):
  path = tmp_path_factory.mktemp("fuzz") / name
  if name == "in.parquet":
    parquet(path, [GOOD] * 20)
  else:
    path.write_bytes(gzip.compress(jsonl(ROWS * 10)))
  damaged = bytearray(path.read_bytes())
  for _ in range(data.draw(st.integers(1, 3))):
    damaged[data.draw(st.integers(0, len(damaged) - 1))] ^= data.draw(st.integers(1, 255))
  path.write_bytes(damaged[:data.draw(st.none() | st.integers(0, len(damaged)))])
  try:
    got = list(records.read(path))
  except records.InputError as e:
    assert str(path) in str(e) and "\n" not in str(e) and ": " in str(e)
  else:
    assert [record.index for record in got] == list(range(len(got)))
    assert all(isinstance(record.value, (dict, records.RowError)) for record in got)


def test_reading_is_lazy(tmp_path):
  path = write(tmp_path, "in.jsonl", jsonl([ROWS[0]] * 1000) + b"{bad")
  assert len(list(itertools.islice(records.read(path), 1000))) == 1000


@settings(max_examples=60, deadline=None)
@given(line=st.binary(max_size=60).filter(lambda b: b"\n" not in b and b.strip()))
def test_no_line_raises(tmp_path_factory, line):
  path = write(tmp_path_factory.mktemp("fuzz"), "in.jsonl", line + b'\n{"id":"z"}\n')
  assert list(records.read(path))[-1].value == {"id": "z"}


@pytest.mark.parametrize("name", ["in.jsonl.gz", "in.parquet"])
def test_memory_does_not_grow_with_the_file(tmp_path, name):
  num_rows = 100_000
  rows = [{"id": str(i), "prompt": "x" * 100} for i in range(num_rows)]
  if name.endswith("parquet"):
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / name, row_group_size=10_000)
  else:
    write(tmp_path, name, gzip.compress(jsonl(rows), 1))
  del rows
  tracemalloc.start()
  last = collections.deque(records.read(tmp_path / name), maxlen=1)[0]
  _, peak = tracemalloc.get_traced_memory()
  tracemalloc.stop()
  assert (last.index, last.value["id"]) == (num_rows - 1, str(num_rows - 1))
  assert peak < 4 << 20
