"""One tokenizer for every file format: text to ids, ids to bytes, bytes to text."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from batchjax import hub
from batchjax.model_files import check_file, damaged
from batchjax.text.gguf_vocab import read_gguf
from batchjax.text.hf_vocab import read_tokenizer_json
from batchjax.text.sentencepiece_vocab import read_sentencepiece
from batchjax.text.special_text import SpecialText
from batchjax.text.stop import build_stop_table, MAX_TABLE_BYTES
from batchjax.text.vocab import Vocab
from batchjax.types import StopTable

_READERS = {".json": read_tokenizer_json, ".model": read_sentencepiece, ".gguf": read_gguf}


class Tokenizer:
  """A model's vocabulary.

  Every token stands for fixed bytes, and a text is the UTF-8 reading of its
  tokens' bytes; bytes that are no UTF-8 become U+FFFD, one for each maximal
  invalid part (Unicode 16, section 3.9). So the text of a sample can be
  streamed and searched token by token. Ids that the vocabulary lacks (models
  pad their embeddings) stand for no bytes.

  Attributes:
    special_ids: tokens that are no text, as BOS or the marks of a chat turn.
    has_space_prefix: the encoder puts a space before a text (SentencePiece).
    bos_token_id, eos_token_id: None where the model has no such token.
    eos_token_ids: all tokens that end a text or a turn, `eos_token_id` first.
    special_tokens: text of the tokens that have a role, as templates name them ("pad_token").
    chat_templates: jinja2 sources by name; `chat_template` is the one called "default", or None.
    special_text: for `chat.render`, where names of special tokens in messages are text; or None.

  Args:
    vocab: a tokenizer file, read.
    split_special_tokens: names of special tokens in prompts and messages are text; those that a
      chat template writes stay tokens.
  """

  def __init__(self, vocab: Vocab, split_special_tokens: bool = False):
    self._codec = vocab.codec
    self._splits = split_special_tokens
    self.special_text = (None if vocab.reads_names_in_messages and not split_special_tokens
                         else SpecialText(vocab.codec.special_names))
    self._pieces = vocab.pieces
    self.special_ids = vocab.special_ids
    self.has_space_prefix = vocab.has_space_prefix
    self.bos_token_id = vocab.bos_token_id
    self.eos_token_ids = vocab.eos_token_ids
    self.eos_token_id = vocab.eos_token_ids[0] if vocab.eos_token_ids else None
    self.special_tokens = vocab.special_tokens
    self.chat_templates = vocab.chat_templates
    self.chat_template = vocab.chat_templates.get("default")
    self._adds_bos = self.bos_token_id is not None and (
        self.encode("")[:1] == [self.bos_token_id])

  @property
  def vocab_size(self) -> int:
    """One more than the largest id."""
    return len(self._pieces)

  @property
  def bos_token(self) -> str:
    """Text of the BOS token; "" where the model has none."""
    return "" if self.bos_token_id is None else self._name(self.bos_token_id)

  @property
  def eos_token(self) -> str:
    """Text of the main end token; "" where the model has none."""
    return "" if self.eos_token_id is None else self._name(self.eos_token_id)

  def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
    """Ids of `text`; special tokens written in it become what they name, unless they are split.

    Args:
      text: any text without lone surrogates.
      add_special_tokens: put BOS before the text if the model's files say so.

    Raises:
      ValueError: the text holds a lone surrogate, which UTF-8 cannot express.
    """
    return self.encode_batch([text], add_special_tokens)[0]

  def encode_batch(self, texts: Sequence[str],
                   add_special_tokens: bool = True) -> list[list[int]]:
    """`encode` of many texts, on all cores."""
    _check_encodable(texts)
    if self._splits:
      return self._codec.encode_sections([[text] for text in texts], add_special_tokens)
    return self._codec.encode_batch(texts, add_special_tokens)

  def encode_chat(self, texts: Sequence[str]) -> list[list[int]]:
    """Ids of what `chat.render` wrote, which has BOS in it where the model wants one.

    Raises:
      ValueError: as `encode`.
    """
    _check_encodable(texts)
    if self.special_text is None:
      return self._codec.encode_batch(texts, add_special_tokens=False)
    return self._codec.encode_sections([self.special_text.sections(text) for text in texts],
                                       add_special_tokens=False)

  def token_bytes(self, token_id: int) -> bytes:
    """What the token adds to a text; nothing for special tokens and ids outside the vocabulary.

    A SentencePiece token keeps its leading space; `decode` drops it at the start of a text.
    """
    return b"" if token_id in self.special_ids else self._piece(token_id)

  def token_name(self, token_id: int) -> bytes:
    """The token's bytes; those of a special token spell its name; none outside the vocabulary."""
    return self._piece(token_id)

  def text_pieces(self, token_ids: Sequence[int], echoed: Sequence[int] = ()) -> list[bytes]:
    """What each token adds to the text of a completion.

    Args:
      token_ids: the generated ones; special tokens among them add nothing.
      echoed: the prompt's, whose text comes first; its special tokens are spelled, less a BOS
        that `encode` puts before every text. Empty where the prompt is not echoed.
    """
    pieces = [self._piece(i) for i in echoed]
    if self._adds_bos and pieces and echoed[0] == self.bos_token_id:
      pieces[0] = b""
    first = next((i for i, piece in enumerate(pieces) if piece), None)
    if self.has_space_prefix and first is not None:
      pieces[first] = pieces[first].removeprefix(b" ")
    return pieces + [self.token_bytes(i) for i in token_ids]

  def decode(self, token_ids: Iterable[int], skip_special_tokens: bool = True, *,
             is_continuation: bool = False) -> str:
    """Text of `token_ids`.

    Args:
      token_ids: ids, at least 0.
      skip_special_tokens: leave special tokens out; False spells their names.
      is_continuation: the ids follow a prompt, so a leading space belongs to
        the text; else the one that the encoder put there is dropped.
    """
    piece = self.token_bytes if skip_special_tokens else self._piece
    data = b"".join(map(piece, token_ids))
    if self.has_space_prefix and not is_continuation:
      data = data.removeprefix(b" ")
    return data.decode("utf-8", errors="replace")

  def stop_table(self, stops: Iterable[tuple[str, ...]], vocab_size: int,
                 max_bytes: int = MAX_TABLE_BYTES) -> StopTable:
    """Automata that find stop strings in tokens: `stop.build_stop_table` with this vocabulary.

    Args:
      stops: the stop strings of each request.
      vocab_size: of the model, which may have more ids than the tokenizer.
      max_bytes: largest table to build.

    Raises:
      ValueError: a stop string is empty, or the table would exceed `max_bytes`.
    """
    return build_stop_table(stops, [self.token_bytes(i) for i in range(vocab_size)], max_bytes)

  def to_json(self) -> str:
    """The vocabulary as the text of a tokenizer.json.

    Raises:
      ValueError: a SentencePiece model has no such form.
    """
    return self._codec.to_json()

  def _name(self, token_id: int) -> str:
    return self._piece(token_id).decode(errors="replace")

  def _piece(self, token_id: int) -> bytes:
    if token_id < 0:
      raise ValueError(f"token id {token_id} is negative: drop null entries before decoding")
    return self._pieces[token_id] if token_id < len(self._pieces) else b""


def load_tokenizer(path: str | Path, split_special_tokens: bool = False) -> Tokenizer:
  """Loads the tokenizer of a model.

  Args:
    path: a Hugging Face folder, a tokenizer.json, a SentencePiece `.model` or a
      `.gguf` file, or a name of the Hub (`batchjax.hub`). JSON files beside the first three are
      read too.
    split_special_tokens: as in `Tokenizer`; for prompts and messages that are not trusted.

  Raises:
    FileNotFoundError: there is no tokenizer at `path`.
    ValueError: the format, or a rule inside it, is not known here.

  >>> tokenizer = batchjax.load_tokenizer(path)
  >>> tokenizer.decode(tokenizer.encode("What is the time?"))
  'What is the time?'
  """
  path = hub.local_path(path, "tokenizer")
  if path.is_dir():
    names = ("tokenizer.json", "tokenizer.model")
    file = next((path / name for name in names if (path / name).exists()), None)
    if file is None:
      raise FileNotFoundError(f"{path} has neither {' nor '.join(names)}: copy one there, "
                              "or name the tokenizer's own path")
    path = file
  if path.suffix not in _READERS:
    raise ValueError(f"{path} is no known kind of tokenizer: name a folder, a file that ends "
                     f"in one of {sorted(_READERS)}, or a model of the Hub (org/name)")
  if not path.exists():
    raise FileNotFoundError(f"there is no tokenizer at {path}")
  check_file(path)
  try:
    return Tokenizer(_READERS[path.suffix](path), split_special_tokens)
  # The libraries trust the file: what they trip over may be of any type.
  except Exception as error:
    if isinstance(error, ValueError) and str(path.parent) in str(error):
      raise  # says which file, and what to do
    raise damaged(path, error) from error


def _check_encodable(texts: Sequence[str]) -> None:
  for row, text in enumerate(texts):
    if not text.isascii():
      try:
        text.encode("utf-8")
      except UnicodeEncodeError as error:
        raise ValueError(f"text {row} holds a lone surrogate at character {error.start}: it is not "
                         "valid Unicode; replace the character") from error
