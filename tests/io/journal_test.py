"""The journal survives being cut anywhere, and damage names its line."""

import json
import os
import tracemalloc
import zlib

from hypothesis import given, settings, strategies as st
import numpy as np
import pytest

from batchjax.io import journal as journal_lib
from batchjax.io import files
from batchjax.io.journal import JournalError, survey

ROWS = [(2, "output", {"text": "é\u2028\n"}), (0, "error", {"message": "m"}), (5, "output", {}),
        (1, "output", {"crc": "x", "index": 9, "error": None})]


def Journal(path, sync_secs=0.5, job_id="mine", num_rows=7):
  return journal_lib.Journal(path, job_id, num_rows, sync_secs)


def write(path, rows=ROWS, **kwargs):
  journal = Journal(path, **kwargs)
  for row in rows:
    journal.append(*row)
  journal.close()
  return path


def contents(journal):
  return list(journal.rows("output")), list(journal.rows("error"))


def test_rows_come_back_in_input_order(tmp_path):
  journal = Journal(write(tmp_path / "j"))
  values = {index: value for index, _, value in ROWS}
  assert contents(journal) == ([values[1], values[2], values[5]], [values[0]])
  assert list(journal.rows("output")) == list(journal.rows("output"))
  assert journal.finished_rows.tolist() == [True, True, True, False, False, True, False]
  assert (journal.num_finished("output"), journal.num_finished("error")) == (3, 1)
  journal.close()


def test_lines_are_json_that_anything_can_read(tmp_path):
  lines = [json.loads(line) for line in write(tmp_path / "j").read_text("utf-8").split("\n")[:-1]]
  assert [line["index"] for line in lines] == [2, 0, 5, 1]
  assert {line["job"] for line in lines} == {"mine"}
  assert lines[0]["output"] == ROWS[0][2]


def test_a_line_is_in_the_file_when_append_returns(tmp_path):
  journal = Journal(tmp_path / "j", sync_secs=1e9)
  for i, row in enumerate(ROWS):
    journal.append(*row)
    assert (tmp_path / "j").read_bytes().count(b"\n") == i + 1
  journal.close()


@pytest.mark.parametrize("sync_secs, num_syncs", [(0.0, 5), (1e9, 1)])
def test_waits_for_the_disk_no_more_often_than_asked(tmp_path, monkeypatch, sync_secs, num_syncs):
  calls = []
  monkeypatch.setattr(journal_lib.os, "fsync", calls.append)
  journal = Journal(tmp_path / "j", sync_secs)
  for row in ROWS:
    journal.append(*row)
  journal.close()
  assert len(calls) == num_syncs  # one at close


def test_cut_at_every_byte_it_goes_on(tmp_path):
  whole = write(tmp_path / "whole").read_bytes()
  ends = [i + 1 for i, byte in enumerate(whole) if byte == ord("\n")]
  for cut in range(len(whole) + 1):
    path = tmp_path / "cut"
    path.write_bytes(whole[:cut])
    journal = Journal(path)
    num_whole = sum(end <= cut for end in ends)
    finished = journal.finished_rows
    assert set(np.flatnonzero(finished)) == {index for index, *_ in ROWS[:num_whole]}
    for row in ROWS:
      if not finished[row[0]]:
        journal.append(*row)
    assert contents(journal)[1] == [{"message": "m"}]
    journal.close()
    assert path.read_bytes() == whole


@pytest.mark.parametrize("tail", [b"\0" * 100, b"\xff", b'{"crc":"00000000",'])
def test_garbage_behind_the_last_line_is_dropped(tmp_path, tail):
  path = write(tmp_path / "j")
  whole = path.read_bytes()
  path.write_bytes(whole + tail)
  Journal(path).close()
  assert path.read_bytes() == whole


@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_any_changed_byte_of_a_whole_line_names_the_line(tmp_path_factory, data):
  path = write(tmp_path_factory.mktemp("j") / "j")
  whole = bytearray(path.read_bytes())
  at = data.draw(st.integers(0, len(whole) - 2))
  to = data.draw(st.integers(0, 255).filter(lambda byte: byte not in (whole[at], ord("\n"))))
  line = whole[:at].count(b"\n") + 1
  if whole[at] == ord("\n"):  # joins two lines, which is one bad line
    to = ord(" ")
  whole[at] = to
  path.write_bytes(whole)
  with pytest.raises(JournalError, match=f"damaged at line {line} .*: delete that line"):
    Journal(path)
  # The remedy works: without that line its row, or both of a joined line, is unfinished.
  lines = bytes(whole).split(b"\n")
  del lines[line - 1]
  path.write_bytes(b"\n".join(lines))
  journal = Journal(path)
  assert journal.finished_rows.sum() in (2, 3)
  journal.close()


def test_a_row_finishes_once(tmp_path):
  journal = Journal(tmp_path / "j")
  journal.append(3, "output", {})
  for kind in ("output", "error"):
    with pytest.raises(JournalError, match="row index 3 is in .* already"):
      journal.append(3, kind, {})
  journal.close()
  path = tmp_path / "j"
  path.write_bytes(path.read_bytes() * 2)
  with pytest.raises(JournalError, match="damaged at line 2 .row index 3 has an earlier line"):
    Journal(path)


def forge(**fields):
  """A line with a checksum that fits, whatever it says."""
  rest = files.dump(fields)[1:].encode() + b"\n"
  return b'{"crc":"%08x",' % zlib.crc32(rest) + rest


@pytest.mark.parametrize("line, message", [
    (forge(job="theirs", index=3, output={}), "it is of job theirs, this is job mine"),
    (forge(job="mine", index=7, output={}), "row index 7 is past the input's 7 rows"),
    (forge(job="mine", index=10**12, output={}), "is past the input's 7 rows"),
    (forge(job="mine", index=-1, output={}), "row index -1"),
    (forge(job="mine", index=True, output={}), "row index True"),
    (forge(job="mine", index="3", output={}), "row index '3'"),
    (forge(index=3, output={}), "no line of a journal of this version"),
    (forge(job="mine", index=3), "no line of a journal of this version"),
    (forge(job="mine", index=3, output={}, error={}), "no line of a journal of this version"),
    (b"[" * 10**5 + b"\n", "checksum does not fit"), (b"\n", "checksum does not fit")])
def test_a_line_that_is_not_of_this_job_is_refused(tmp_path, line, message):
  path = write(tmp_path / "j")
  whole = path.read_bytes()
  for data in (whole + line, line + whole):
    path.write_bytes(data)
    with pytest.raises(JournalError, match=f"damaged at line [15] .*{message}.*: delete that line"):
      Journal(path)
    assert path.read_bytes() == data


def test_a_copied_journal_is_refused(tmp_path):
  path = write(tmp_path / "j", job_id="theirs")
  with pytest.raises(JournalError, match="line 1 .*of job theirs.* or start anew with --overwrite"):
    Journal(path)


def test_a_line_changed_while_the_job_ran_is_not_written_out(tmp_path):
  journal = Journal(write(tmp_path / "j"))
  with (tmp_path / "j").open("r+b") as f:
    f.seek(-4, os.SEEK_END)
    f.write(b"x")
  with pytest.raises(JournalError, match="was changed by others .row index 1: its checksum"):
    list(journal.rows("output"))
  journal.close()


def test_survey(tmp_path):
  path = tmp_path / "j"
  assert survey(path) == (set(), False)
  write(path, ROWS[1:2])
  assert survey(path) == ({"mine"}, False)
  write(path, ROWS[:1], job_id="mine")
  assert survey(path) == ({"mine"}, True)
  path.write_bytes(path.read_bytes() + b"torn")
  assert survey(path) == ({"mine"}, True)
  path.write_bytes(b"damaged\n")
  assert survey(path) == ({""}, True)


def test_nan_is_refused_before_a_byte_is_written(tmp_path):
  journal = Journal(tmp_path / "j")
  with pytest.raises(ValueError):
    journal.append(0, "output", {"x": float("nan")})
  assert (tmp_path / "j").read_bytes() == b""
  assert not journal.finished_rows.any()
  journal.close()


def test_a_full_disk_leaves_whole_lines(tmp_path):
  class FullDisk:
    """Takes 5 bytes of a line, then no more."""

    def __init__(self, file):
      self.file, self.taken = file, 0

    def write(self, data):
      if self.taken:
        raise OSError(28, "No space left on device")
      self.taken = self.file.write(data[:5])
      return self.taken

    def truncate(self, size):
      return self.file.truncate(size)

  journal = Journal(tmp_path / "j")
  journal.append(*ROWS[0])
  whole = (tmp_path / "j").read_bytes()
  file, journal._file = journal._file, FullDisk(journal._file)
  with pytest.raises(JournalError, match="No space left on device.*make room and run the same"):
    journal.append(*ROWS[1])
  assert (tmp_path / "j").read_bytes() == whole
  journal._file = file
  journal.append(*ROWS[1])  # the row was not finished
  journal.close()
  journal = Journal(tmp_path / "j")
  assert contents(journal) == ([ROWS[0][2]], [ROWS[1][2]])
  journal.close()


def test_memory_is_a_few_bytes_per_row(tmp_path):
  num_rows = 20_000
  journal = Journal(tmp_path / "j", num_rows=num_rows)
  for index in range(num_rows):
    journal.append(index, "output", {"text": "x" * 300})
  journal.close()
  tracemalloc.start()
  journal = Journal(tmp_path / "j", num_rows=num_rows)
  num_read = sum(1 for _ in journal.rows("output"))
  _, peak = tracemalloc.get_traced_memory()
  tracemalloc.stop()
  journal.close()
  assert num_read == num_rows
  assert os.path.getsize(tmp_path / "j") > 300 * num_rows
  assert peak < 60 * num_rows
