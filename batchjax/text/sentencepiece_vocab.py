"""SentencePiece `.model` files, run by the `sentencepiece` library."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import sentencepiece

from batchjax.text.folder_config import read_folder_config
from batchjax.text.hf_vocab import metaspace_bytes
from batchjax.text.vocab import Vocab, check_ids, end_tokens

# Appended to a serialized model it overrides `normalizer_spec.add_dummy_prefix`: parts of a message
# merge, and what comes later wins (Protocol Buffers, encoding, "Last One Wins").
_NO_SPACE_PREFIX = b"\x1a\x02\x18\x00"


class SentencePieceCodec:
  """Encodes with a `SentencePieceProcessor`, and finds added tokens in a text itself.

  The library never reads a control token out of a text, so the text is cut at
  them and each part encoded as a text of its own. As in mistral-common each such
  part has one space before it, whether it is written (as templates do) or not.

  Args:
    processor: the model.
    special_names: tokens to cut at, and their ids.
    added_names: the same of tokens that are text.
    prefix_ids: put first on request.
    is_legacy: False puts no space before a part that follows a token to cut at.
  """

  def __init__(self, processor: sentencepiece.SentencePieceProcessor,
               special_names: Mapping[str, int], added_names: Mapping[str, int],
               prefix_ids: list[int], is_legacy: bool):
    self.special_names = special_names
    self._processor = processor
    self._unprefixed = sentencepiece.SentencePieceProcessor(
        model_proto=processor.serialized_model_proto() + _NO_SPACE_PREFIX)
    # Such a model takes the written space away and then puts its own.
    self._strips = processor.normalize(" a") == processor.normalize("a")
    self._ids = {**special_names, **added_names}
    self._special, self._added = map(_splitter, (special_names, added_names))
    self._prefix_ids = prefix_ids
    self._is_legacy = is_legacy

  def encode_batch(self, texts: Sequence[str], add_special_tokens: bool) -> list[list[int]]:
    return self.encode_sections([self._special.split(text) for text in texts], add_special_tokens)

  def encode_sections(self, rows: Sequence[Sequence[str]],
                      add_special_tokens: bool) -> list[list[int]]:
    prefix_ids = self._prefix_ids if add_special_tokens else []
    cut = [[part for i, section in enumerate(row)
            for part in ([section] if i % 2 else self._added.split(section))] for row in rows]
    encoded = self._encode_parts([(part, i == 0) for row in cut
                                  for i, part in enumerate(row) if i % 2 == 0])
    return [prefix_ids + [token_id for i, part in enumerate(row)
                          for token_id in ([self._ids[part]] if i % 2 else next(encoded))]
            for row in cut]

  def _encode_parts(self, parts: Sequence[tuple[str, bool]]) -> Iterator[list[int]]:
    """Ids of plain texts; each with whether it begins its row."""
    choices = [is_first or self._strips or (self._is_legacy and not part.startswith(" "))
               for part, is_first in parts]
    encoded = {choice: iter(processor.encode([part for (part, _), chosen in zip(parts, choices)
                                              if chosen == choice]))
               for choice, processor in ((True, self._processor), (False, self._unprefixed))}
    return (next(encoded[choice]) for choice in choices)

  def to_json(self) -> str:
    raise ValueError("a SentencePiece model has no tokenizer.json form here: "
                     "copy its .model file beside the weights instead")


def _splitter(names: Iterable[str]) -> re.Pattern[str]:
  """Splits a text into plain, name, plain, ...; one that never matches keeps it whole."""
  longest_first = sorted(names, key=len, reverse=True)
  return re.compile(f"({'|'.join(map(re.escape, longest_first)) or '(?!)'})")


def read_sentencepiece(path: Path) -> Vocab:
  """Reads a SentencePiece model and the configuration files beside it.

  As in mistral-common a control token comes from a prompt or a template that spells its
  name, and never from the messages of a chat.

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

  num_pieces, added = processor.get_piece_size(), config.added_tokens
  tokens = [processor.id_to_piece(i) for i in range(num_pieces)]
  check_ids(added)
  tokens += [""] * (max(added, default=-1) + 1 - num_pieces)
  special_names = {tokens[i]: i for i in range(num_pieces) if processor.is_control(i)}
  special = {*special_names.values(), *filter(processor.is_unknown, range(num_pieces))}
  added_names = {}
  for token_id, (text, is_special) in added.items():
    tokens[token_id] = text
    special |= {token_id} if is_special else set()
    (special_names if is_special else added_names).setdefault(text, token_id)
  ids = {token: i for i, token in enumerate(tokens)}

  own = {"bos_token": processor.bos_id(), "eos_token": processor.eos_id(),
         "unk_token": processor.unk_id(), "pad_token": processor.pad_id()}
  special_tokens = {name: tokens[i] for name, i in own.items() if i >= 0} | config.special_tokens
  bos, eos = (_token_id(ids, special_tokens.get(name), path) for name in ("bos_token", "eos_token"))
  adds_bos = config.adds_bos is not False and bos is not None
  codec = SentencePieceCodec(processor, special_names, added_names, [bos] if adds_bos else [],
                             config.is_legacy)
  return Vocab(codec, [metaspace_bytes(token) for token in tokens], frozenset(special),
               processor.normalize("a").startswith("▁"), bos,
               end_tokens(eos, ids.get, *config.eos_token_ids), special_tokens,
               config.chat_templates, reads_names_in_messages=False)


def _token_id(ids: Mapping[str, int], token: str | None, path: Path) -> int | None:
  if token is None:
    return None
  if token not in ids:
    raise ValueError(f"{path} lacks the token {token!r} that its tokenizer_config.json names")
  return ids[token]
