"""Names of special tokens in text that must not be read as tokens."""

import re
from collections.abc import Iterable

# A private-use character, put into names and taken out again before the text is encoded.
_BREAK = "\U0010fffd"


class SpecialText:
  """Tells the special tokens that a template wrote from names in what it was given.

  Names in the strings that a template is given are broken before it runs. What is whole in its
  output is its own, also where it builds a name around a string, as "<|" + role + "|>".

  Args:
    names: of the special tokens.
  """

  def __init__(self, names: Iterable[str]):
    names = sorted(filter(None, names), key=lambda name: (-len(name), name))
    pattern = "|".join(map(re.escape, names)) or "(?!)"  # which never matches
    self._whole = re.compile(f"({pattern})")
    self._starts = re.compile(f"(?=(?:{pattern}))")
    self._heads = {name[:end] for name in names for end in range(1, len(name))}
    self._tails = {name[start:] for name in names for start in range(1, len(name))}
    self._longest = max(map(len, names), default=0)

  def hide(self, text: str) -> str:
    """The text with all names broken, and with a break where one could join what stands beside it.

    Raises:
      ValueError: the text holds the character that breaks names.
    """
    if _BREAK in text:
      raise ValueError(f"the text holds the private-use character U+{ord(_BREAK):X}, with which "
                       "names of special tokens are kept apart: remove it")
    cuts = {match.start() + 1 for match in self._starts.finditer(text)}
    inner = text.strip()  # templates often strip the rest
    start = text.find(inner)
    for length in range(1, min(self._longest, len(inner) + 1)):
      if inner[:length] in self._tails:
        cuts.add(start)
      if inner[-length:] in self._heads:
        cuts.add(start + len(inner))
    for cut in sorted(cuts, reverse=True):
      text = text[:cut] + _BREAK + text[cut:]
    return text

  def sections(self, text: str) -> list[str]:
    """A template's output as plain text, the name of a special token, plain text, and so on."""
    parts = self._whole.split(text)
    parts[::2] = [part.replace(_BREAK, "") for part in parts[::2]]
    return parts
