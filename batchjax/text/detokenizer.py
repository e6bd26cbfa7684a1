"""Text as tokens arrive: exactly what decoding them all would give."""

import codecs

from batchjax.text.tokenizer import Tokenizer


class Detokenizer:
  """Turns the tokens of one sample into text, special tokens left out.

  The pieces that `push` and `finish` return, joined, equal
  `tokenizer.decode(all_ids, is_continuation=is_continuation)`.
  """

  def __init__(self, tokenizer: Tokenizer, *, is_continuation: bool = False):
    self._tokenizer = tokenizer
    self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    self._drops_space = tokenizer.has_space_prefix and not is_continuation

  def push(self, token_id: int) -> str:
    """The text that became certain with this token; "" while a character is incomplete."""
    data = self._tokenizer.token_bytes(token_id)
    if self._drops_space and data:
      data = data.removeprefix(b" ")
      self._drops_space = False
    return self._decoder.decode(data)

  def finish(self) -> str:
    """The rest: U+FFFD for a character that never became complete."""
    return self._decoder.decode(b"", final=True)
