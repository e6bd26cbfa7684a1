"""What every tokenizer file comes down to, whatever its format."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Protocol, runtime_checkable

# No model has nearly as many tokens; a larger id is damage, and would take its size in memory.
_MAX_IDS = 1 << 24


@runtime_checkable
class Codec(Protocol):
  """Text to ids, by the library that owns the format.

  Attributes:
    special_names: the special tokens that are read in a text, and their ids.
  """

  special_names: Mapping[str, int]

  def encode_batch(self, texts: Sequence[str], add_special_tokens: bool) -> list[list[int]]:
    ...

  def encode_sections(self, rows: Sequence[Sequence[str]],
                      add_special_tokens: bool) -> list[list[int]]:
    """Of plain text, the name of a special token, plain text, ...; names in plain text are text."""

  def to_json(self) -> str:
    ...


@dataclasses.dataclass(frozen=True)
class Vocab:
  """A tokenizer file, read.

  Attributes:
    codec: turns text into ids.
    pieces: for each id the bytes it stands for; those of a special token spell its name.
    special_ids: tokens that are no text: left out when a text is decoded.
    has_space_prefix: the encoder puts a space before a text, so decoding a whole text drops it.
    bos_token_id: None where the model has no such token.
    eos_token_ids: tokens that end a text or a turn, the main one first.
    special_tokens: text of the tokens that have a role, as templates name them ("pad_token").
    chat_templates: jinja2 sources by name; chat takes "default", with tools "tool_use".
    reads_names_in_messages: names of special tokens in the messages of a chat become tokens.
  """

  codec: Codec
  pieces: Sequence[bytes]
  special_ids: frozenset[int]
  has_space_prefix: bool
  bos_token_id: int | None
  eos_token_ids: tuple[int, ...]
  special_tokens: Mapping[str, str]
  chat_templates: Mapping[str, str]
  reads_names_in_messages: bool = True


def check_ids(ids: Iterable[int]) -> None:
  """Raises ValueError for a token id that no vocabulary can have."""
  if wrong := [i for i in ids if not (type(i) is int and 0 <= i < _MAX_IDS)]:
    raise ValueError(f"the token id {wrong[0]!r} is no integer from 0 to {_MAX_IDS - 1}")


def end_tokens(main: int | None, id_of: Callable[[str], int | None],
               *others: int | None) -> tuple[int, ...]:
  """Tokens that end a text: the main one, those that end a turn by their name, others; no None."""
  ids = [main, *map(id_of, _ENDS_OF_TURN), *others]
  return tuple(dict.fromkeys(i for i in ids if i is not None))


# What ends a turn in the models that have one: ChatML, Llama 3 and 4, Gemma, OpenChat. Folders of
# tuned models often name only the end of a text, which the model then never writes.
_ENDS_OF_TURN = ("<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|eot|>", "<|eom|>", "<end_of_turn>",
                 "<|end_of_turn|>")
