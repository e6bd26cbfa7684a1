"""A tokenizer of one token per character, with the interface of `text.Tokenizer`."""

from collections.abc import Iterable, Mapping, Sequence

from batchjax.text.tokenizer import Tokenizer

_CHARS = [chr(code) for code in range(32, 127)] + ["\n"]


class FakeTokenizer:
  """Ids 1 to 96 are the printable ASCII characters and the line break; 0 ends a text."""

  bos_token = eos_token = ""
  eos_token_ids = ()
  bos_token_id, eos_token_id = None, 0
  special_tokens: Mapping[str, str] = {}
  special_text = None
  chat_template = None
  special_ids = frozenset()
  vocab_size = 1 + len(_CHARS)

  @property
  def chat_templates(self) -> Mapping[str, str]:
    """The one template, if there is one."""
    return {"default": self.chat_template} if self.chat_template else {}

  def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
    """One id for each character; others are read as "?"."""
    return [1 + _CHARS.index(char if char in _CHARS else "?") for char in text]

  def encode_batch(self, texts: Sequence[str], add_special_tokens: bool = True) -> list[list[int]]:
    """`encode` of many texts."""
    return [self.encode(text) for text in texts]

  def encode_chat(self, texts: Sequence[str]) -> list[list[int]]:
    """The same of what a template wrote."""
    return self.encode_batch(texts, add_special_tokens=False)

  stop_table = Tokenizer.stop_table  # needs `token_bytes` alone

  def token_bytes(self, token_id: int) -> bytes:
    """The character's byte; nothing for the end token."""
    return _CHARS[token_id - 1].encode() if token_id else b""

  def token_name(self, token_id: int) -> bytes:
    """The character's byte, or the end token's name."""
    return self.token_bytes(token_id) or b"<end>"

  def text_pieces(self, token_ids: Sequence[int], echoed: Sequence[int] = ()) -> list[bytes]:
    """What each token adds to the text of a completion."""
    return [*map(self.token_name, echoed), *map(self.token_bytes, token_ids)]

  def decode(self, token_ids: Iterable[int], *, is_continuation: bool = False) -> str:
    """The characters, one after the other."""
    return b"".join(map(self.token_bytes, token_ids)).decode()
