"""SentencePiece `.model` files, run by the `sentencepiece` library."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import sentencepiece

from batchjax.text.hf_vocab import metaspace_bytes
from batchjax.text.vocab import Vocab, end_tokens, read_folder_config


class SentencePieceCodec:
  """Encodes with a `SentencePieceProcessor`, and finds special tokens in a text itself.

  The library never reads a control token out of a text, so the text is cut at
  them and each part encoded as a text of its own.
  """

  def __init__(self, processor: sentencepiece.SentencePieceProcessor,
               split_ids: Mapping[str, int], prefix_ids: list[int]):
    self._processor = processor
    self._split_ids = split_ids
    self._prefix_ids = prefix_ids
    longest_first = sorted(split_ids, key=len, reverse=True)
    # With nothing to find, a pattern that never matches keeps the text whole.
    self._splitter = re.compile(f"({'|'.join(map(re.escape, longest_first)) or '(?!)'})")

  def encode_batch(self, texts: Sequence[str], add_special_tokens: bool) -> list[list[int]]:
    parts = [self._splitter.split(text) for text in texts]  # plain, special, plain, ...
    plain = iter(self._processor.encode([part for row in parts for part in row[::2]]))
    prefix_ids = self._prefix_ids if add_special_tokens else []
    rows = []
    for row in parts:
      ids = prefix_ids + next(plain)
      for special in row[1::2]:
        ids.append(self._split_ids[special])
        ids.extend(next(plain))
      rows.append(ids)
    return rows

  def to_json(self) -> str:
    raise ValueError("a SentencePiece model has no tokenizer.json form here: "
                     "copy its .model file beside the weights instead")


def read_sentencepiece(path: Path) -> Vocab:
  """Reads a SentencePiece model and the configuration files beside it.

  Raises:
    ValueError: the file is no SentencePiece model.
  """
  processor = sentencepiece.SentencePieceProcessor()
  try:
    processor.load(str(path))
  except RuntimeError as error:
    raise ValueError(f"{path} is not a SentencePiece model ({error}); a tiktoken file of that "
                     "name needs the model's tokenizer.json instead") from error
  config = read_folder_config(path.parent)

  num_pieces = processor.get_piece_size()
  added = config.added_tokens
  tokens = [processor.id_to_piece(i) for i in range(num_pieces)]
  tokens += [""] * (max(added, default=-1) + 1 - num_pieces)
  special = {i for i in range(num_pieces)
             if processor.is_control(i) or processor.is_unknown(i)}
  split_ids = {tokens[i]: i for i in range(num_pieces) if processor.is_control(i)}
  for token_id, (text, is_special) in added.items():
    tokens[token_id] = text
    split_ids[text] = token_id
    if is_special:
      special.add(token_id)
  ids = {token: i for i, token in enumerate(tokens)}

  own = {"bos_token": processor.bos_id(), "eos_token": processor.eos_id(),
         "unk_token": processor.unk_id(), "pad_token": processor.pad_id()}
  special_tokens = {name: tokens[i] for name, i in own.items() if i >= 0} | config.special_tokens
  bos_token_id = _token_id(ids, special_tokens.get("bos_token"), path)
  eos_token_id = _token_id(ids, special_tokens.get("eos_token"), path)
  adds_bos = config.adds_bos is not False and bos_token_id is not None
  codec = SentencePieceCodec(processor, split_ids, [bos_token_id] if adds_bos else [])
  return Vocab(codec, [metaspace_bytes(token) for token in tokens], frozenset(special),
               processor.normalize("a").startswith("▁"), bos_token_id,
               end_tokens(eos_token_id, ids.get, *config.eos_token_ids), special_tokens,
               config.chat_templates)


def _token_id(ids: Mapping[str, int], token: str | None, path: Path) -> int | None:
  if token is None:
    return None
  if token not in ids:
    raise ValueError(f"{path} lacks the token {token!r} that its tokenizer_config.json names")
  return ids[token]
