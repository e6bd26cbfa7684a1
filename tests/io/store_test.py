"""Requests come back from disk as they were spilled."""

import dataclasses
import hashlib
import os
import tracemalloc

import numpy as np
import pytest

from batchjax.io import store
from batchjax.io.files import DamagedFile
from batchjax.io.validate import Row
from batchjax.types import SamplingParams

PARAMS = [
    SamplingParams(),
    SamplingParams(temperature=0.1 + 0.2, top_k=3, seed=2**32 - 1, n=4, stop=("\n", "é\u2028"),
                   stop_token_ids=(1, 2), ignore_eos=True, logit_bias=((7, -1.5), (8, 100.0)),
                   logprobs=True, top_logprobs=5, prompt_logprobs=True, min_p=0.25, top_p=0.9,
                   min_tokens=2, max_tokens=77, presence_penalty=-2.0, frequency_penalty=0.5,
                   repetition_penalty=1.1),
]


def rows(num_rows):
  rng = np.random.default_rng(0)
  for i in range(num_rows):
    row = Row(index=3 * i, row=3 * i + 1, request_id=f"é{i}", form=("chat", "plain")[i % 2],
              prompt="not kept", sampling_params=PARAMS[i % 2], model="m" * (i % 3),
              echo=i % 5 == 0, return_token_ids=i % 7 == 0)
    yield row, rng.integers(0, 1000, 1 + i % 13).astype(np.int32)


def spill(path, num_rows):
  with store.RequestWriter(path) as writer:
    for row, token_ids in rows(num_rows):
      writer.append(row, token_ids)


def check(stored, row, token_ids):
  for name in ("index", "row", "form", "model", "echo", "return_token_ids"):
    assert getattr(stored, name) == getattr(row, name)
  assert stored.request.request_id == row.request_id
  assert stored.request.sampling_params == row.sampling_params
  assert stored.request.prompt_token_ids.dtype == np.int32
  np.testing.assert_array_equal(stored.request.prompt_token_ids, token_ids)


@pytest.mark.parametrize("num_rows, batch_rows, batch_tokens", [(1, 10, 100), (50, 7, 10**6),
                                                                (50, 100, 20), (50, 50, 10**6)])
def test_round_trip(tmp_path, monkeypatch, num_rows, batch_rows, batch_tokens):
  monkeypatch.setattr(store, "_BATCH_ROWS", batch_rows)
  monkeypatch.setattr(store, "_BATCH_TOKENS", batch_tokens)
  spill(tmp_path / "r.arrow", num_rows)
  want = list(rows(num_rows))
  with store.RequestReader(tmp_path / "r.arrow") as reader:
    assert len(reader) == num_rows
    assert reader.prompt_lens.tolist() == [len(tokens) for _, tokens in want]
    assert reader.indices.tolist() == [row.index for row, _ in want]
    for i in np.random.default_rng(1).permutation(num_rows):
      check(reader.row(int(i)), *want[i])
    for stored, (row, token_ids) in zip(reader.rows(0, num_rows), want, strict=True):
      check(stored, row, token_ids)


def test_sequence_protocol(tmp_path):
  spill(tmp_path / "r.arrow", 20)
  with store.RequestReader(tmp_path / "r.arrow") as reader:
    ids = [f"é{i}" for i in range(20)]
    assert [request.request_id for request in reader] == ids
    for window in (slice(3, 9), slice(None), slice(15, 99), slice(-3, None), slice(9, 3),
                   slice(0, 20, 7)):
      assert [request.request_id for request in reader[window]] == ids[window]
    assert reader[-1].request_id == "é19"
    for i in (20, -21):
      with pytest.raises(IndexError):
        reader[i]


def test_empty_file(tmp_path):
  spill(tmp_path / "r.arrow", 0)
  with store.RequestReader(tmp_path / "r.arrow") as reader:
    assert (len(reader), list(reader), reader.prompt_lens.shape) == (0, [], (0,))


def test_any_flipped_bit_is_found(tmp_path):
  path, rng = tmp_path / "r.arrow", np.random.default_rng(0)
  spill(path, 20)
  whole = path.read_bytes()
  sha256 = hashlib.sha256(whole).hexdigest()
  store.RequestReader(path, sha256).close()
  for at in rng.integers(0, 8 * len(whole), 200):
    data = bytearray(whole)
    data[at // 8] ^= 1 << at % 8
    path.write_bytes(data)
    with pytest.raises(DamagedFile, match="r.arrow is damaged: its hash does not fit"):
      store.RequestReader(path, sha256)
  for data in (whole[:-1], whole + b"x", b""):
    path.write_bytes(data)
    with pytest.raises(DamagedFile, match="r.arrow is "):
      store.RequestReader(path, sha256)
  path.unlink()
  with pytest.raises(DamagedFile, match="r.arrow is missing"):
    store.RequestReader(path, sha256)


def test_requests_outlive_the_reader(tmp_path):
  spill(tmp_path / "r.arrow", 3)
  with store.RequestReader(tmp_path / "r.arrow") as reader:
    request = reader[1]
  assert request.prompt_token_ids.shape == (2,)
  with pytest.raises(ValueError, match="read-only"):
    request.prompt_token_ids[0] = 1


def test_a_spill_that_fails_leaves_no_file(tmp_path):
  with pytest.raises(KeyError, match="mine"):
    with store.RequestWriter(tmp_path / "r.arrow") as writer:
      writer.append(*next(rows(1)))
      raise KeyError("mine")
  with pytest.raises(UnicodeEncodeError):  # found on leaving the block
    with store.RequestWriter(tmp_path / "r.arrow") as writer:
      row, token_ids = next(rows(1))
      writer.append(dataclasses.replace(row, model="\ud800"), token_ids)
  assert os.listdir(tmp_path) == []


def test_memory_is_bounded_by_a_batch(tmp_path):
  num_rows, prompt_len = 30_000, 100
  row = next(rows(1))[0]
  tokens = np.arange(prompt_len, dtype=np.int32)
  tracemalloc.start()
  with store.RequestWriter(tmp_path / "r.arrow") as writer:
    for i in range(num_rows):
      writer.append(row, tokens)
  _, writer_peak = tracemalloc.get_traced_memory()
  tracemalloc.reset_peak()
  with store.RequestReader(tmp_path / "r.arrow") as reader:
    total = sum(int(reader[i].prompt_token_ids[-1]) for i in range(0, num_rows, 50))
  _, reader_peak = tracemalloc.get_traced_memory()
  tracemalloc.stop()
  assert total == 600 * (prompt_len - 1)
  assert (tmp_path / "r.arrow").stat().st_size > num_rows * prompt_len * 4
  assert max(writer_peak, reader_peak) < 10 << 20


def plain_row(index):
  return Row(index=index, row=index + 1, request_id=f"r{index}", form="plain", prompt="",
             sampling_params=SamplingParams())


def test_windows_bring_shared_prefixes_together(tmp_path):
  rng = np.random.default_rng(0)
  system = rng.integers(0, 1000, 20)
  documents = [rng.integers(0, 1000, 100) for _ in range(30)]
  groups = rng.permutation(np.repeat(np.arange(30), 10))
  with store.RequestWriter(tmp_path / "r.arrow") as writer:
    for i, group in enumerate(groups):
      tokens = np.concatenate([system, documents[group], rng.integers(0, 1000, rng.integers(1, 9))])
      writer.append(plain_row(i), tokens.astype(np.int32))
  with store.RequestReader(tmp_path / "r.arrow") as reader:
    windows = list(reader.windows(50))
    assert [len(w) for w in windows] == [50] * 6
    np.testing.assert_array_equal(np.sort(np.concatenate(windows)), np.arange(300))
    in_window = [set(groups[w].tolist()) for w in windows]
    assert all(len(held) == 5 for held in in_window)  # every group lies in one window
    first = [list(dict.fromkeys(groups[w].tolist())) for w in windows]
    assert sum(first, []) == list(dict.fromkeys(groups.tolist()))  # in order of first appearance
    np.testing.assert_array_equal(next(reader.windows(300)), np.arange(300))
    taken = reader.take(windows[2])
    assert [r.index for r in taken] == windows[2].tolist()
    for position, stored in zip(windows[2].tolist(), taken):
      np.testing.assert_array_equal(stored.request.prompt_token_ids,
                                    reader[position].prompt_token_ids)
      assert stored.request.request_id == reader[position].request_id


def test_windows_tell_prompts_apart_that_are_prefixes_of_others(tmp_path):
  prompts = [[1, 2], [1, 2, 3], [5], [1, 2], [5], [0], [0, 0]]
  with store.RequestWriter(tmp_path / "r.arrow") as writer:
    for i, prompt in enumerate(prompts):
      writer.append(plain_row(i), np.array(prompt, np.int32))
  with store.RequestReader(tmp_path / "r.arrow") as reader:
    order = np.concatenate(list(reader.windows(2))).tolist()
  assert order == [0, 3, 1, 2, 4, 5, 6]


def test_an_empty_store_has_no_windows(tmp_path):
  with store.RequestWriter(tmp_path / "r.arrow"):
    pass
  with store.RequestReader(tmp_path / "r.arrow") as reader:
    assert list(reader.windows(3)) == []
