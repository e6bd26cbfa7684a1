"""Streaming against decoding everything at once."""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from batchjax.text import Detokenizer, load_tokenizer

any_format = settings(max_examples=150, deadline=None,
                      suppress_health_check=[HealthCheck.function_scoped_fixture])


def stream(tokenizer, ids, **options):
  detokenizer = Detokenizer(tokenizer, **options)
  return [*(detokenizer.push(i) for i in ids), detokenizer.finish()]


@any_format
@given(data=st.data(), is_continuation=st.booleans())
def test_any_ids_stream_to_the_same_text(tokenizer_path, data, is_continuation):
  tokenizer = load_tokenizer(tokenizer_path)
  # A few ids past the vocabulary too.
  ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size + 3), max_size=30))
  pieces = stream(tokenizer, ids, is_continuation=is_continuation)
  assert "".join(pieces) == tokenizer.decode(ids, is_continuation=is_continuation)


@any_format
@given(raw=st.binary(max_size=12) | st.text(max_size=4).map(str.encode))
def test_any_bytes_stream_to_the_same_text(metaspace_folder, raw):
  tokenizer = load_tokenizer(metaspace_folder)
  ids = [3 + byte for byte in raw]  # the byte tokens
  text = raw.removeprefix(b" ").decode("utf-8", errors="replace")
  assert "".join(stream(tokenizer, ids)) == tokenizer.decode(ids) == text


@pytest.mark.parametrize("text", ["😀", "👩‍👩‍👧‍👦", "a😀b日é", "  two spaces"])
def test_no_text_before_a_character_is_complete(tokenizer_path, text):
  tokenizer = load_tokenizer(tokenizer_path)
  ids = tokenizer.encode(text)
  pieces = stream(tokenizer, ids)
  assert "".join(pieces) == text
  assert "\ufffd" not in "".join(pieces) and pieces[-1] == ""
  raw = [tokenizer.token_bytes(i) for i in ids]
  assert len(raw) > 1
  # Each piece comes with the token that completes it, not later.
  for end in range(len(raw) + 1):
    so_far = b"".join(raw[:end])
    so_far = so_far.removeprefix(b" ") if tokenizer.has_space_prefix else so_far
    assert "".join(pieces[:end]) == so_far.decode("utf-8", errors="ignore")


def test_cut_off_character_becomes_one_mark(metaspace_folder):
  tokenizer = load_tokenizer(metaspace_folder)
  ids = [3 + byte for byte in "😀".encode()[:3]]
  assert stream(tokenizer, ids) == ["", "", "", "\ufffd"]
  assert stream(tokenizer, [*ids, 3 + ord("x")]) == ["", "", "", "\ufffdx", ""]


def test_the_encoders_space_is_dropped_once(metaspace_folder):
  tokenizer = load_tokenizer(metaspace_folder)
  the = tokenizer.encode("the", add_special_tokens=False)
  ids = [tokenizer.bos_token_id, *the, *the]
  assert stream(tokenizer, ids) == ["", "the", " the", ""]
  assert stream(tokenizer, ids, is_continuation=True) == ["", " the", " the", ""]
