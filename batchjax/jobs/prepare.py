"""An input file as tokenized requests on disk: all that can go wrong before a model loads."""

import dataclasses
import itertools
import pathlib
from collections.abc import Iterator, Mapping

import numpy as np

from batchjax.cache.page_table import pages_for
from batchjax.config import ConfigError, JobConfig, ModelConfig
from batchjax.io import records, validate
from batchjax.io.records import RowError
from batchjax.io.store import RequestReader, RequestWriter
from batchjax.plan.memory import num_kv_pages
from batchjax.text import chat
from batchjax.text.messages import MessageError
from batchjax.text.tokenizer import Tokenizer

_BATCH_ROWS = 2048


class BadRow(ValueError):
  """The first bad row of a strict job."""


@dataclasses.dataclass(frozen=True)
class Prepared:
  """What one pass over the input found.

  Attributes:
    num_rows: records of the file, bad ones included.
    errors: the bad rows.
  """

  num_rows: int
  errors: tuple[RowError, ...]


def prepare(input_path: str, store_path: pathlib.Path, config: JobConfig, model: ModelConfig,
            tokenizer: Tokenizer) -> Prepared:
  """Reads, validates and tokenizes every row once; good ones go to `store_path`.

  Args:
    input_path: see `io.records.read`.
    store_path: where `io.store.RequestReader` finds the requests afterwards.
    config: defaults of sampling, name of the model, sizes that a row must fit.
    model: vocabulary and context of the model.
    tokenizer: of the model.

  Raises:
    InputError: the file cannot be read at all.
    BadRow: a row is bad and `config.strict` is set.
    ConfigError: the chat template cannot be read or compiled.
  """
  try:
    sources = tokenizer.chat_templates
    if config.chat_template:
      sources = {"default": pathlib.Path(config.chat_template).expanduser().read_text("utf-8")}
    templates = {name: chat.compile_template(source) for name, source in sources.items()
                 if name in ("default", "tool_use")}
  except (OSError, ValueError) as e:
    raise ConfigError(f"chat_template={config.chat_template!r}: {e}") from e
  rows = (validate.parse(record, defaults=config.sampling, model_name=config.model.name,
                         job_seed=config.seed) if not isinstance(record.value, RowError)
          else record.value for record in records.read(input_path))
  duplicates, errors, num_rows = validate.DuplicateIds(), [], 0
  with RequestWriter(store_path) as store:
    for batch in _batches(rows):
      num_rows += len(batch)
      for row, token_ids in zip(batch, _tokenize(batch, templates, tokenizer)):
        error = token_ids if isinstance(token_ids, RowError) else (
            duplicates.check(row) or validate.check_prompt(row, token_ids, model.vocab_size,
                                                           model.max_len)
            or _check_pool(row, len(token_ids), config, model))
        if error is None:
          store.append(row, token_ids)
        elif config.strict:
          raise BadRow(str(error))
        else:
          errors.append(error)
  return Prepared(num_rows, tuple(errors))


def _batches(rows: Iterator[validate.Row | RowError]) -> Iterator[list[validate.Row | RowError]]:
  while batch := list(itertools.islice(rows, _BATCH_ROWS)):
    yield batch


def _tokenize(rows: list[validate.Row | RowError], templates: Mapping[str, chat.ChatTemplate],
              tokenizer: Tokenizer) -> list[np.ndarray | RowError]:
  """Token ids of each row, or its error."""
  prompts: dict[int, str] = {}
  chats: dict[int, str] = {}
  results: list[np.ndarray | RowError | None] = [None] * len(rows)
  for i, row in enumerate(rows):
    if isinstance(row, RowError):
      results[i] = row
    elif isinstance(row.prompt, str):
      prompts[i] = row.prompt
    elif isinstance(row.prompt, np.ndarray):
      results[i] = row.prompt
    elif (template := chat.choose(templates, row.tools)) is None:
      results[i] = _error(row, "messages", "the model has no chat template: give a prompt, or set "
                          "chat_template in the configuration", "unsupported")
    else:
      try:  # a template may refuse messages, which concerns this row alone
        chats[i] = chat.render(
            template, row.prompt, tools=row.tools, special_tokens=tokenizer.special_tokens,
            special_text=tokenizer.special_text, **row.chat_template_kwargs)
      except MessageError as e:
        results[i] = _error(row, e.field, str(e), e.code)
      except ValueError as e:
        results[i] = _error(row, "messages", str(e), "invalid_value")
  for chosen, encode_fn in ((prompts, tokenizer.encode_batch), (chats, tokenizer.encode_chat)):
    for i, token_ids in zip(chosen, encode_fn(list(chosen.values()))):
      results[i] = np.array(token_ids, np.int32)
  return results


def _check_pool(row: validate.Row, prompt_len: int, config: JobConfig,
                model: ModelConfig) -> RowError | None:
  """Whether the row fits the KV pool alone, whatever it shares: each level may start a page."""
  engine, max_tokens = config.engine, row.sampling_params.max_tokens
  needed = pages_for(prompt_len + max_tokens, engine.page_size) + engine.max_levels + 1
  num_pages = num_kv_pages(model, engine)
  if needed <= num_pages:
    return None
  return _error(row, "max_tokens", f"{prompt_len} prompt tokens and max_tokens={max_tokens} need "
                f"up to {needed} KV pages of {engine.page_size} tokens, the pool has {num_pages}: "
                "shorten them, or raise engine.kv_memory_bytes or engine.num_pages",
                "context_length_exceeded")


def _error(row: validate.Row, field: str, message: str, code: str) -> RowError:
  return RowError(row.index, row.row, row.request_id, field, message, code)


def stop_strings(requests: RequestReader) -> tuple[tuple[str, ...], ...]:
  """Every distinct tuple of stop strings."""
  return tuple(dict.fromkeys(r.sampling_params.stop for r in requests if r.sampling_params.stop))
