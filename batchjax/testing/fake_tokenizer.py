"""A tokenizer of one token per character, with the interface of `text.Tokenizer`."""

from collections.abc import Iterable, Sequence

_CHARS = [chr(code) for code in range(32, 127)] + ["\n"]


class FakeTokenizer:
  """Ids 1 to 96 are the printable ASCII characters and the line break; 0 ends a text."""

  bos_token = eos_token = ""
  chat_template = None
  special_ids = frozenset()
  vocab_size = 1 + len(_CHARS)

  def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
    """One id for each character; others are read as "?"."""
    return [1 + _CHARS.index(char if char in _CHARS else "?") for char in text]

  def encode_batch(self, texts: Sequence[str], add_special_tokens: bool = True) -> list[list[int]]:
    """`encode` of many texts."""
    return [self.encode(text) for text in texts]

  def token_bytes(self, token_id: int) -> bytes:
    """The character's byte; nothing for the end token."""
    return _CHARS[token_id - 1].encode() if token_id else b""

  def decode(self, token_ids: Iterable[int], *, is_continuation: bool = False) -> str:
    """The characters, one after the other."""
    return b"".join(map(self.token_bytes, token_ids)).decode()
