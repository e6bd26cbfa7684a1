"""What holds for a tokenizer of any format."""

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from batchjax.text import load_tokenizer

TEXTS = ["", "the capital", " the", "the  theatre", "naïve café", "12345 and  7", "a\n\n  b\t",
         "😀 日本語 \u200d", "def f(a):\n  return a", "x" * 200]
any_format = settings(max_examples=60, deadline=None,
                      suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.mark.parametrize("text", TEXTS)
def test_decode_inverts_encode(tokenizer_path, text):
  tokenizer = load_tokenizer(tokenizer_path)
  assert tokenizer.decode(tokenizer.encode(text)) == text
  assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


@any_format
@given(text=st.text(max_size=40))
def test_decode_inverts_encode_of_any_text(tokenizer_path, text):
  tokenizer = load_tokenizer(tokenizer_path)
  # `▁` is how SentencePiece writes a space: it cannot come back.
  text = text.replace("▁", "")
  assert tokenizer.decode(tokenizer.encode(text)) == text


def test_batch_equals_single_texts(tokenizer_path):
  tokenizer = load_tokenizer(tokenizer_path)
  many = TEXTS * 500  # more than one chunk
  for add_special_tokens in (True, False):
    singles = [tokenizer.encode(text, add_special_tokens) for text in TEXTS]
    assert tokenizer.encode_batch(many, add_special_tokens) == singles * 500
  assert tokenizer.encode_batch([]) == []


def test_token_bytes_join_to_the_text(tokenizer_path):
  tokenizer = load_tokenizer(tokenizer_path)
  for text in TEXTS:
    joined = b"".join(tokenizer.token_bytes(i) for i in tokenizer.encode(text))
    prefix = b" " if tokenizer.has_space_prefix and text else b""
    assert joined == prefix + text.encode()


def test_special_tokens_are_no_text(tokenizer_path):
  tokenizer = load_tokenizer(tokenizer_path)
  assert {tokenizer.bos_token_id, tokenizer.eos_token_id} <= tokenizer.special_ids
  assert all(tokenizer.token_bytes(i) == b"" for i in tokenizer.special_ids)
  ids = [tokenizer.bos_token_id, *tokenizer.encode("the", add_special_tokens=False),
         tokenizer.eos_token_id]
  assert tokenizer.decode(ids) == "the"
  spelled = tokenizer.decode(ids, skip_special_tokens=False)
  assert spelled.startswith(tokenizer.bos_token) and spelled.endswith(tokenizer.eos_token)


def test_special_tokens_written_in_a_text_are_found(tokenizer_path):
  tokenizer = load_tokenizer(tokenizer_path)
  ids = tokenizer.encode(f"the{tokenizer.eos_token}the", add_special_tokens=False)
  the = tokenizer.encode("the", add_special_tokens=False)
  assert ids == [*the, tokenizer.eos_token_id, *the]


def test_a_continuation_keeps_its_space(tokenizer_path):
  tokenizer = load_tokenizer(tokenizer_path)
  prompt, whole = (tokenizer.encode(text, False) for text in ("the capital", "the capital of"))
  assert whole[:len(prompt)] == prompt
  assert tokenizer.decode(whole[len(prompt):], is_continuation=True) == " of"


def test_an_echoed_prompt_spells_its_special_tokens(tokenizer_path):
  """As it was written: a BOS that `encode` put before it is no part of it."""
  tokenizer = load_tokenizer(tokenizer_path)
  eos = tokenizer.eos_token
  for prompt in ("the capital", eos, f"{eos}{eos}the", f"the{eos}", f"{tokenizer.bos_token}{eos}"):
    echoed = tokenizer.encode(prompt)
    pieces = tokenizer.text_pieces([tokenizer.eos_token_id], echoed)
    assert len(pieces) == len(echoed) + 1 and pieces[-1] == b""
    # After a special token the space of the encoder cannot be told from one of the text.
    assert b"".join(pieces).decode().replace("> the", ">the") == prompt
  the = tokenizer.encode("the", add_special_tokens=False)
  joined = b"".join(tokenizer.text_pieces([*the, tokenizer.eos_token_id])).decode()
  assert joined == tokenizer.decode(the, is_continuation=True)


def test_names_of_tokens(tokenizer_path):
  tokenizer = load_tokenizer(tokenizer_path)
  assert tokenizer.token_name(tokenizer.eos_token_id).decode() == tokenizer.eos_token != ""
  the = tokenizer.encode("the", add_special_tokens=False)[0]
  assert tokenizer.token_name(the) == tokenizer.token_bytes(the)
  assert tokenizer.token_name(tokenizer.vocab_size) == b""


def test_unused_and_negative_ids(tokenizer_path):
  tokenizer = load_tokenizer(tokenizer_path)
  the = tokenizer.encode("the", add_special_tokens=False)
  padded = np.array([*the, tokenizer.vocab_size, tokenizer.vocab_size + 99], np.int32)
  assert tokenizer.decode(padded) == "the"
  assert tokenizer.token_bytes(tokenizer.vocab_size) == b""
  with pytest.raises(ValueError, match="-1 is negative"):
    tokenizer.decode([-1])


def test_lone_surrogate_names_the_text(tokenizer_path):
  tokenizer = load_tokenizer(tokenizer_path)
  with pytest.raises(ValueError, match="text 1 holds a lone surrogate at character 2"):
    tokenizer.encode_batch(["fine", "ab\ud800"])


def test_paths_that_are_no_tokenizer(tmp_path):
  with pytest.raises(FileNotFoundError, match="neither tokenizer.json nor tokenizer.model"):
    load_tokenizer(tmp_path)
  with pytest.raises(FileNotFoundError, match="no tokenizer at"):
    load_tokenizer(tmp_path / "missing.gguf")
  with pytest.raises(ValueError, match="no known kind"):
    load_tokenizer(tmp_path / "vocab.txt")
