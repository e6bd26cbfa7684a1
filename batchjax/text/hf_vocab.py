"""Vocabularies that the `tokenizers` library runs: tokenizer.json, and those built in memory."""

import functools
import re
import secrets
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import processors

from batchjax.text.folder_config import read_folder_config, read_json
from batchjax.text.vocab import Vocab, check_ids, end_tokens

# Texts handed to the library at a time: its encodings weigh many times what their ids do.
_CHUNK = 4096


class TokenizersCodec:
  """Encodes with a `tokenizers.Tokenizer`."""

  def __init__(self, backend: tokenizers.Tokenizer):
    backend.no_truncation()
    backend.no_padding()
    self._backend = backend
    self.special_names = {token.content: i for i, token in
                          backend.get_added_tokens_decoder().items() if token.special}

  def encode_batch(self, texts: Sequence[str], add_special_tokens: bool) -> list[list[int]]:
    return _encode(self._backend, texts, add_special_tokens)

  def encode_sections(self, rows: Sequence[Sequence[str]],
                      add_special_tokens: bool) -> list[list[int]]:
    backend, marks, ids = self._plain
    texts = ["".join(marks[part] if i % 2 else part for i, part in enumerate(row)) for row in rows]
    return [[ids.get(i, i) for i in row] for row in _encode(backend, texts, add_special_tokens)]

  def to_json(self) -> str:
    return self._backend.to_str()

  @functools.cached_property
  def _plain(self) -> tuple[tokenizers.Tokenizer, dict[str, str], dict[int, int]]:
    """A copy that reads no names; marks that stand for them, and the ids for those of the marks."""
    backend = tokenizers.Tokenizer.from_str(self._backend.to_str())
    backend.encode_special_tokens = True
    secret = secrets.token_hex(8)  # no text can spell a mark
    marks, ids = {}, {}
    for i, token in self._backend.get_added_tokens_decoder().items():
      if token.special:
        marks[token.content] = f"\U000f0000{secret}.{i}\U000f0001"
        backend.add_tokens([tokenizers.AddedToken(
            marks[token.content], lstrip=token.lstrip, rstrip=token.rstrip,
            single_word=token.single_word, normalized=False)])
        ids[backend.token_to_id(marks[token.content])] = i
    return backend, marks, ids


def _encode(backend: tokenizers.Tokenizer, texts: Sequence[str],
            add_special_tokens: bool) -> list[list[int]]:
  chunks = (list(texts[start:start + _CHUNK]) for start in range(0, len(texts), _CHUNK))
  return [encoding.ids for chunk in chunks for encoding in backend.encode_batch_fast(
      chunk, add_special_tokens=add_special_tokens)]


def read_tokenizer_json(path: Path) -> Vocab:
  """Reads a tokenizer.json and the configuration files beside it.

  Raises:
    ValueError: the file is not a tokenizer.json, or its decoder is of a kind whose tokens
      do not stand for fixed bytes.
  """
  contents = read_json(path)
  if "model" not in contents:
    raise ValueError(f"{path} is not a tokenizer.json: it has no `model`")
  backend = tokenizers.Tokenizer.from_file(str(path))
  config = read_folder_config(path.parent)
  is_byte_level, has_space_prefix = _decoder_rules(contents.get("decoder"), path)
  _make_special(backend, config.special_tokens.values())
  added = backend.get_added_tokens_decoder()
  ids = backend.get_vocab(with_added_tokens=True)
  check_ids(ids.values())
  pieces = [b""] * (1 + max(ids.values()))
  to_bytes = byte_level_bytes if is_byte_level else metaspace_bytes
  for token, i in ids.items():
    # A byte-level vocabulary writes the tokens added to it as they are, not in its alphabet.
    is_literal = i in added and (is_byte_level or added[i].special)
    pieces[i] = token.encode() if is_literal else to_bytes(token)

  bos_token, eos_token = map(config.special_tokens.get, ("bos_token", "eos_token"))
  bos_token_id = _token_id(backend, bos_token, path)
  eos_token_id = _token_id(backend, eos_token, path)
  if config.adds_bos is not None:
    _set_adds_bos(backend, bos_token, bos_token_id, config.adds_bos)
  return Vocab(TokenizersCodec(backend), pieces,
               frozenset(i for i, token in added.items() if token.special), has_space_prefix,
               bos_token_id, end_tokens(eos_token_id, backend.token_to_id, *config.eos_token_ids),
               config.special_tokens, config.chat_templates)


def _make_special(backend: tokenizers.Tokenizer, texts: Iterable[str]) -> None:
  """Tokens that have a role are special, whatever the file calls them, as in transformers."""
  added = {token.content: token for token in backend.get_added_tokens_decoder().values()}
  for text in texts:
    token = added.get(text)
    if backend.token_to_id(text) is not None and not (token and token.special):
      flags = {} if token is None else dict(lstrip=token.lstrip, rstrip=token.rstrip,
                                            single_word=token.single_word)
      backend.add_special_tokens([tokenizers.AddedToken(text, normalized=False, **flags)])


def bos_processor(bos_token: str, bos_token_id: int) -> processors.PostProcessor:
  """Puts BOS before a text."""
  return processors.TemplateProcessing(single=[f"{bos_token}:0", "$A:0"],
                                       special_tokens=[(bos_token, bos_token_id)])


def byte_level_bytes(token: str) -> bytes:
  """Bytes of a token of a byte-level vocabulary (GPT-2's printable alphabet for bytes)."""
  try:
    return bytes(_BYTE_OF[char] for char in token)
  except KeyError:  # not written in that alphabet: the token is its own text
    return token.encode()


def metaspace_bytes(token: str) -> bytes:
  """Bytes of a SentencePiece-like token: `▁` is a space, `<0xE2>` is one byte."""
  if byte := re.fullmatch("<0x([0-9A-Fa-f]{2})>", token):
    return bytes.fromhex(byte[1])
  return token.replace("▁", " ").encode()


def _byte_alphabet() -> dict[str, int]:
  """The character that stands for each byte: printable Latin-1 itself, the others from 256 up."""
  printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
  others = (byte for byte in range(256) if byte not in printable)
  return ({chr(byte): byte for byte in printable}
          | {chr(256 + i): byte for i, byte in enumerate(others)})


_BYTE_OF = _byte_alphabet()


def _decoder_rules(decoder: dict[str, Any] | None, path: Path) -> tuple[bool, bool]:
  """(is byte level, drops a leading space) of a decoder whose tokens stand for fixed bytes."""
  decoders = [] if decoder is None else decoder.get("decoders", [decoder])
  kinds = [decoder["type"] for decoder in decoders]
  if kinds == ["ByteLevel"]:
    return True, False
  known = {"Metaspace", "Replace", "ByteFallback", "Fuse", "Strip"}
  by_kind = dict(zip(kinds, decoders))
  replaces = by_kind.get("Replace", {"pattern": {"String": "▁"}, "content": " "})
  strips = by_kind.get("Strip", {"content": " ", "start": 0, "stop": 0})
  if (not kinds or not set(kinds) <= known or not {"Metaspace", "Replace"} & set(kinds)
      or (replaces["pattern"], replaces["content"]) != ({"String": "▁"}, " ")
      or strips["content"] != " " or strips["start"] > 1 or strips["stop"]):
    raise ValueError(f"{path} has the decoder {decoders}; this package decodes ByteLevel, "
                     "Metaspace and the Replace/ByteFallback/Fuse/Strip chain of SentencePiece "
                     "models: convert the tokenizer to one of them")
  metaspace = by_kind.get("Metaspace", {"prepend_scheme": "never"})
  return False, bool(strips["start"]) or metaspace.get("prepend_scheme", "always") != "never"


def _token_id(backend: tokenizers.Tokenizer, token: str | None, path: Path) -> int | None:
  if token is None:
    return None
  token_id = backend.token_to_id(token)
  if token_id is None:
    raise ValueError(f"{path} lacks the token {token!r} that tokenizer_config.json or "
                     "special_tokens_map.json names: the files belong to different models")
  return token_id


def _set_adds_bos(backend: tokenizers.Tokenizer, bos_token: str | None, bos_token_id: int | None,
                  adds_bos: bool) -> None:
  """Obeys `add_bos_token` of tokenizer_config.json, which has the last word."""
  has_bos = bos_token_id is not None and bos_token_id in backend.encode("").ids
  if adds_bos and not has_bos:
    if bos_token_id is None:
      raise ValueError("tokenizer_config.json sets add_bos_token and names no bos_token: "
                       "name it, or set add_bos_token to false")
    backend.post_processor = bos_processor(bos_token, bos_token_id)
  elif has_bos and not adds_bos:
    backend.post_processor = None
