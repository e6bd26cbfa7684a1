"""An input file as tokenized requests on disk: all that can go wrong before a model loads."""

from collections.abc import Callable, Iterable, Iterator
import dataclasses
import functools
import itertools
import pathlib
from typing import Any, NamedTuple, TypeVar

import numpy as np

from batchjax.cache.page_table import pages_for
from batchjax.config import ConfigError, JobConfig, ModelConfig
from batchjax.io import carried, records, scores as scores_lib, validate
from batchjax.io.fields import InvalidField, one_line
from batchjax.io.records import Record, RowError
from batchjax.io.store import RequestReader, RequestWriter
from batchjax.model_files import check_file
from batchjax.plan.memory import num_kv_pages
from batchjax.text import chat
from batchjax.text.messages import MessageError
from batchjax.text.stop import StopBudget
from batchjax.text.tokenizer import Tokenizer

T = TypeVar("T")
_BATCH_ROWS, _BATCH_CHARS = 2048, 1 << 25
_NO_TOKENS = np.zeros(0, np.int32)


class BadRow(ValueError):
  """The first bad row of a strict job."""


@dataclasses.dataclass(frozen=True)
class Prepared:
  """What one pass over the input found.

  Attributes:
    num_rows: records of the file that count, bad ones included.
    errors: the bad rows.
    carried: names under which rows carry something through to the output (`io.carried`).
  """

  num_rows: int
  errors: tuple[RowError, ...]
  carried: tuple[str, ...] = ()


def prepare(input_path: str, store_path: pathlib.Path, config: JobConfig, model: ModelConfig,
            tokenizer: Tokenizer, limit: int | None = None, scores: bool = False,
            advance: Callable[[int], None] = lambda num_rows: None) -> Prepared:
  """Reads, validates and tokenizes every row once; good ones go to `store_path`.

  Args:
    input_path: see `io.records.read`.
    store_path: where `io.store.RequestReader` finds the requests afterwards.
    config: defaults of sampling, name of the model, sizes that a row must fit.
    model: vocabulary and context of the model.
    tokenizer: of the model.
    limit: only the first so many rows; None takes all.
    scores: rows are scored (`validate.parse`); each continuation of a row is a request.
    advance: is told the number of rows each time some more are done.

  Raises:
    InputError: the file cannot be read at all.
    BadRow: a row is bad and `config.strict` is set.
    ConfigError: the chat template cannot be read or compiled.
  """
  errors, num_rows = [], 0
  names = carried.Names(config.limits, "score" if scores else "plain")
  source = records.read(input_path, config.limits.max_line_bytes, limit)
  with RequestWriter(store_path) as store:
    for requests in prepare_rows(source, config, model, tokenizer, scores, names):
      num_rows += 1
      advance(1)
      if not isinstance(requests, RowError):
        for request in requests:
          store.append(*request)
      elif config.strict:
        raise BadRow(str(requests))
      else:
        errors.append(requests)
  return Prepared(num_rows, tuple(errors), tuple(names))


def prepare_rows(source: Iterable[Record], config: JobConfig, model: ModelConfig, tokenizer: Tokenizer,
                 scores: bool = False, names: carried.Names | None = None
                 ) -> Iterator[list[tuple[validate.Row, np.ndarray]] | RowError]:
  """The requests of each row with their token ids, or its error; in order.

  Args:
    source: the rows.
    config, model, tokenizer, scores: as in `prepare`.
    names: is told what the rows carry.

  Raises:
    ConfigError: the chat template cannot be read or compiled.
  """
  renderer = _Renderer(config, tokenizer, scores)
  first_token = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
  stops = StopBudget(model.vocab_size, config.limits.max_stop_table_bytes)
  duplicates = validate.DuplicateIds()
  names = names or carried.Names(config.limits)

  def text_of(record: Record) -> _Text | RowError:
    names.add(record)
    text = renderer.prompt_of(record)
    if not isinstance(text, RowError):
      names.check(record)
    return text

  texts = (guarded(record, "", text_of, record) for record in source)

  def check(row: validate.Row, token_ids: list[np.ndarray]
            ) -> list[tuple[validate.Row, np.ndarray]] | RowError:
    """The requests of a row; counts the stop strings of those that run."""
    error, requests = duplicates.check(row), []
    for part, ids in [] if error else scores_lib.requests_of(row, token_ids, first_token):
      part = validate.fit_default(part, len(ids), model.max_len)
      # Requests need ids of their own, which no other row may have.
      error = error or ((duplicates.check(part) if part.request_id != row.request_id else None)
                        or validate.check_prompt(part, ids, model.vocab_size, model.max_len)
                        or _check_pool(part, len(ids), config, model)
                        or _check_stop(part, stops, config))
      requests.append((part, ids))
    return dataclasses.replace(error, request_id=row.request_id) if error else requests

  for batch in _batches(texts):
    for row, token_ids in _tokenize(batch, tokenizer):
      yield row if isinstance(row, RowError) else guarded(row, "", check, row, token_ids)


class _Text(NamedTuple):
  """A valid row with what of it is to be tokenized (`scores.texts`), or with its prompt's token ids."""

  row: validate.Row
  texts: tuple[str | np.ndarray, ...]
  is_chat: bool = False
  field: str = "prompt"


class _Renderer:
  """Turns records into prompts; raises whatever a record's contents make a library raise."""

  def __init__(self, config: JobConfig, tokenizer: Tokenizer, scores: bool):
    self._config, self._tokenizer, self._scores = config, tokenizer, scores
    try:
      sources = tokenizer.chat_templates
      if config.chat_template:
        path = pathlib.Path(config.chat_template).expanduser()
        check_file(path)
        sources = {"default": path.read_text("utf-8")}
      self._templates = {name: chat.compile_template(source, config.limits)
                         for name, source in sources.items() if name in ("default", "tool_use")}
    except (OSError, ValueError) as e:
      raise ConfigError(f"chat_template={config.chat_template!r}: {e}") from e
    self._special_ids = {tokenizer.decode([token], skip_special_tokens=False, is_continuation=True):
                         token for token in sorted(tokenizer.special_ids, reverse=True)}

  def prompt_of(self, record: Record) -> _Text | RowError:
    """The prompt of a row, or what is wrong with the row."""
    if isinstance(record.value, RowError):
      return record.value
    config = self._config
    row = validate.parse(record, defaults=config.sampling, model_name=config.model.name,
                         job_seed=config.seed, limits=config.limits, scores=self._scores)
    if isinstance(row, RowError):
      return row
    row = self._with_stop_ids(row)
    if not isinstance(row.prompt, list):
      return _Text(row, scores_lib.texts(row, row.prompt, config.limits))
    text = guarded(row, "messages", self._render, row)
    if isinstance(text, RowError):
      return text
    texts = scores_lib.texts(row, text, config.limits)
    # What made the prompt is not held any longer.
    row = dataclasses.replace(row, prompt="", tools=None, chat_template_kwargs={})
    return _Text(row, texts, is_chat=True, field="messages")

  def _render(self, row: validate.Row) -> str:
    template = chat.choose(self._templates, row.tools)
    if template is None:
      raise InvalidField("messages", "the model has no chat template: give a prompt, or set "
                         "chat_template in the configuration", "unsupported")
    try:
      return chat.render(
          template, row.prompt, tools=row.tools, special_tokens=self._tokenizer.special_tokens,
          special_text=self._tokenizer.special_text, **row.chat_template_kwargs)
    except MessageError as e:
      raise InvalidField(e.field, str(e), e.code) from e
    except ValueError as e:
      raise InvalidField("messages", str(e)) from e

  def _with_stop_ids(self, row: validate.Row) -> validate.Row:
    """The row; a stop string that spells a special token, which is no text, is that token's id."""
    params = row.sampling_params
    ids = [self._special_ids[text] for text in params.stop if text in self._special_ids]
    if not ids:
      return row
    return dataclasses.replace(row, sampling_params=dataclasses.replace(
        params, stop=tuple(text for text in params.stop if text not in self._special_ids),
        stop_token_ids=tuple(dict.fromkeys([*params.stop_token_ids, *ids]))))


def guarded(row: Record | validate.Row, field: str, fn: Callable[..., T], *args: Any
             ) -> T | RowError:
  """What `fn` returns, or the error row that stands for whatever a row made it raise.

  The one place where that is so: parsing, rendering, tokenizing and checking a row run in it.
  """
  values = row.value if isinstance(row, Record) and isinstance(row.value, dict) else {}
  request_id = getattr(row, "request_id", values.get("custom_id", values.get("id")))
  request_id = request_id if isinstance(request_id, str) and len(request_id) < 1024 else None
  error = functools.partial(RowError, row.index, row.row, request_id)
  try:
    return fn(*args)
  except InvalidField as e:
    return error(e.field, str(e), e.code)
  except BaseException as e:
    # A panic of the tokenizers library, which is written in Rust, is no Exception.
    if not isinstance(e, Exception) and type(e).__name__ != "PanicException":
      raise
    return error(field, f"{field or 'the row'} cannot be processed ({one_line(e)}): change "
                 "it, or remove the row", "invalid_value")


def _batches(texts: Iterator[_Text | RowError]) -> Iterator[list[_Text | RowError]]:
  """Rows to tokenize at a time: many, unless they are long."""
  batch, num_chars = [], 0
  for text in texts:
    batch.append(text)
    num_chars += 0 if isinstance(text, RowError) else sum(map(len, text.texts))
    if len(batch) == _BATCH_ROWS or num_chars >= _BATCH_CHARS:
      yield batch
      batch, num_chars = [], 0
  if batch:
    yield batch


def _tokenize(batch: list[_Text | RowError], tokenizer: Tokenizer
              ) -> list[tuple[validate.Row | RowError, list[np.ndarray]]]:
  """Each row with the token ids of its texts, or its error with none."""
  results = [(item, []) if isinstance(item, RowError) else
             (item.row, list(item.texts)) for item in batch]
  for is_chat, encode_fn in ((False, tokenizer.encode_batch), (True, tokenizer.encode_chat)):
    chosen = [i for i, item in enumerate(batch) if isinstance(item, _Text)
              and isinstance(item.texts[0], str) and item.is_chat == is_chat]

    def encode(*positions: int) -> list[list[list[int]]]:
      token_ids = iter(encode_fn([text for i in positions for text in batch[i].texts]))
      return [list(itertools.islice(token_ids, len(batch[i].texts))) for i in positions]

    encoded = guarded(batch[chosen[0]].row, "", encode, *chosen) if chosen else []
    if isinstance(encoded, RowError):  # one row is to blame, and each is told by itself
      encoded = [guarded(batch[i].row, batch[i].field, encode, i) for i in chosen]
      encoded = [item if isinstance(item, RowError) else item[0] for item in encoded]
    for i, ids in zip(chosen, encoded):
      results[i] = (ids, []) if isinstance(ids, RowError) else (
          batch[i].row, [np.array(text_ids, np.int32) for text_ids in ids])
  return results


def _check_pool(row: validate.Row, prompt_len: int, config: JobConfig,
                model: ModelConfig) -> RowError | None:
  """Whether the row fits the KV pool alone, whatever it shares: each level may start a page."""
  engine, max_tokens = config.engine, row.sampling_params.max_tokens
  needed = pages_for(prompt_len + max_tokens, engine.page_size) + engine.max_levels + 1
  num_pages = num_kv_pages(model, engine)
  if needed <= num_pages:
    return None
  what = f"{prompt_len} prompt tokens and max_tokens={max_tokens}"
  if row.continuations:
    what = f"{prompt_len} tokens of prompt and continuation"
  return _error(row, "prompt" if row.continuations else "max_tokens", f"{what} need "
                f"up to {needed} KV pages of {engine.page_size} tokens, the pool has {num_pages}: "
                "shorten them, or raise engine.kv_memory_bytes or engine.num_pages",
                "context_length_exceeded")


def _check_stop(row: validate.Row, stops: StopBudget, config: JobConfig) -> RowError | None:
  """Whether the automata of the row's stop strings fit behind those of the rows before it."""
  if not row.sampling_params.stop:
    return None
  try:
    stops.add(row.sampling_params.stop)
  except ValueError as e:
    limit = config.limits.max_stop_table_bytes
    return _error(row, "stop", f"{e}, or raise limits.max_stop_table_bytes={limit}",
                  "limit_exceeded")
  return None


def _error(row: validate.Row, field: str, message: str, code: str) -> RowError:
  return RowError(row.index, row.row, row.request_id, field, message, code)


def stop_strings(requests: RequestReader) -> tuple[tuple[str, ...], ...]:
  """Every distinct tuple of stop strings."""
  return tuple(dict.fromkeys(r.sampling_params.stop for r in requests if r.sampling_params.stop))
