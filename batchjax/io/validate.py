"""Turns the rows of an input file into requests to tokenize, or says what is wrong with them."""

from collections.abc import Sequence
import dataclasses
import hashlib
from typing import Any

import numpy as np

from batchjax.config import RowLimits
from batchjax.io import fields as fields_lib
from batchjax.io import prompts
from batchjax.io.fields import Form, InvalidField
from batchjax.io.records import Record, RowError
from batchjax.plan.requests import find_problem
from batchjax.types import SamplingParams, SCORING

_URLS: dict[str, Form] = {"/v1/chat/completions": "chat", "/v1/completions": "completions"}


@dataclasses.dataclass(frozen=True)
class Row:
  """A valid row whose prompt is not tokenized yet.

  Attributes:
    index: 0-based place among the records of the file.
    row: 1-based row for messages.
    request_id: `custom_id` or `id`, else "row-<row>".
    form: what the row was and its output will be: "chat" and "completions" are
      OpenAI batch lines, "plain" has its fields at the top level; so have rows to score, which are
      "score" with one continuation, "choices" with a list of them, and "document" with a text.
    prompt: text, chat messages, or token ids.
    sampling_params: complete, defaults filled in.
    is_default_len: `max_tokens` is the job's default, which the room in the context may cut.
    model: the name that the row gives the model, or "".
    echo: the text begins with the prompt.
    return_token_ids: the output has the token ids too.
    tools: function descriptions for the chat template, or None.
    chat_template_kwargs: further variables of the chat template.
    continuations: to score behind the prompt: texts or i32[len] each; () is a row to complete.
  """

  index: int
  row: int
  request_id: str
  form: Form
  prompt: str | list[dict[str, Any]] | np.ndarray
  sampling_params: SamplingParams
  is_default_len: bool = False
  model: str = ""
  echo: bool = False
  return_token_ids: bool = False
  tools: list[dict[str, Any]] | None = None
  chat_template_kwargs: dict[str, Any] = dataclasses.field(default_factory=dict)
  continuations: tuple[str, ...] | tuple[np.ndarray, ...] = ()


def parse(record: Record, *, defaults: SamplingParams, model_name: str, job_seed: int,
          limits: RowLimits = RowLimits(), scores: bool = False) -> Row | RowError:
  """Checks everything about a row that needs no tokenizer; the first error counts.

  Two forms: the line of an OpenAI batch file (`custom_id`, `method`, `url`,
  `body`), and a plain one with its fields at the top level (`id`, one of
  `prompt`, `messages` and `prompt_token_ids`, sampling fields named as in
  SamplingParams). A field that is null counts as absent. In both forms an
  absent sampling field takes the job's default, not that of OpenAI's API. What
  a row holds beside these is `io.carried`'s.

  Args:
    record: the row as read.
    defaults: the job's sampling parameters.
    model_name: what `model` must say where a row has it; "" accepts any name.
    job_seed: hashed with the request id into the seed of a row without one.
    limits: what the row may ask for.
    scores: rows are scored: `id`, a prompt as in the plain form and one of `continuation`, `continuations`
      and `continuation_token_ids`, or `text` alone.
  """
  if isinstance(record.value, RowError):
    return record.value
  value = {name: item for name, item in record.value.items() if item is not None}
  request_id = None
  try:
    is_batch = not scores and bool(fields_lib.ENVELOPE & set(value))
    request_id = _request_id(value, "custom_id" if is_batch else "id", record.row, limits)
    form, fields = _envelope(value) if is_batch else ("score" if scores else "plain", value)
    fields_lib.check_sizes(fields, limits)
    fields_lib.check_names(fields, form)
    if scores:
      form, prompt, continuations = prompts.scored(fields, limits)
      return Row(record.index, record.row, request_id, form, prompt, SCORING,
                 model=_model(fields, model_name), tools=prompts.tools(fields),
                 chat_template_kwargs=prompts.chat_template_kwargs(fields),
                 continuations=continuations)
    return Row(
        index=record.index,
        row=record.row,
        request_id=request_id,
        form=form,
        prompt=prompts.prompt(fields, form),
        sampling_params=fields_lib.sampling_params(fields, form, defaults, limits=limits,
                                                   job_seed=job_seed, request_id=request_id),
        is_default_len=not {"max_tokens", "max_completion_tokens"} & set(fields),
        model=_model(fields, model_name),
        echo=_echo(fields),
        return_token_ids=fields_lib.flag(fields, "return_token_ids"),
        tools=prompts.tools(fields),
        chat_template_kwargs=prompts.chat_template_kwargs(fields))
  except InvalidField as e:
    return RowError(record.index, record.row, request_id, e.field, str(e), e.code)


def fit_default(row: Row, prompt_len: int, max_len: int) -> Row:
  """The row; where its `max_tokens` is the job's default, no more of it than the context has room."""
  params, room = row.sampling_params, max_len - prompt_len
  if not row.is_default_len or not max(1, params.min_tokens) <= room < params.max_tokens:
    return row
  return dataclasses.replace(row, sampling_params=dataclasses.replace(params, max_tokens=room))


def check_prompt(row: Row, token_ids: np.ndarray | Sequence[int], vocab_size: int,
                 max_len: int) -> RowError | None:
  """What the tokenized prompt shows to be wrong, or None.

  Args:
    row: the row.
    token_ids: i32[prompt_len], its prompt.
    vocab_size: token ids must be below it.
    max_len: most tokens of prompt and completion together.
  """
  found = find_problem(token_ids, row.sampling_params, vocab_size, max_len)
  if found and row.continuations:
    is_text = row.form == "document"
    what = "the text has" if is_text else "prompt and continuation have"
    found = found._replace(field="text" if is_text and found.field == "prompt" else found.field,
                           message=found.message.replace("the prompt has", what, 1))
  return found and RowError(row.index, row.row, row.request_id, *found)


class DuplicateIds:
  """Finds ids that were used before; keeps a 16-byte hash of each, not the id."""

  def __init__(self):
    self._seen: set[bytes] = set()

  def check(self, row: Row) -> RowError | None:
    """An error if an earlier row that was checked here has the same request id."""
    digest = hashlib.blake2b(row.request_id.encode(), digest_size=16).digest()
    if digest not in self._seen:
      self._seen.add(digest)
      return None
    field = "custom_id" if row.form in _URLS.values() else "id"
    return RowError(row.index, row.row, row.request_id, field,
                    f"{field} {row.request_id!r} is used by an earlier row: make it unique",
                    "duplicate_id")


def _request_id(value: dict[str, Any], field: str, row: int, limits: RowLimits) -> str:
  request_id = value.get(field)
  if request_id is None and field == "id":
    return f"row-{row}"
  if request_id is None:
    raise InvalidField(field, "custom_id is missing: give each request a unique one",
                       "missing_field")
  if field == "id" and type(fields_lib.whole(request_id)) is int:
    request_id = str(fields_lib.whole(request_id))  # many data sets number their rows
  if not isinstance(request_id, str) or not request_id:
    fields_lib.reject(field, "a non-empty string", request_id)
  fields_lib.require_at_most(field, len(request_id), "characters", limits, "max_name_chars")
  return request_id


def _envelope(value: dict[str, Any]) -> tuple[Form, dict[str, Any]]:
  """The form and body of an OpenAI batch line."""
  for name in sorted(set(value) - fields_lib.ENVELOPE):
    remedy = ("move it into body" if name in fields_lib.FIELDS["plain"] - {"id"} else
              "a batch line has custom_id, method, url and body, whose metadata is carried through")
    raise InvalidField(name, f"{name} stands beside body: {remedy}", "unknown_field")
  for name in ("method", "url", "body"):
    if name not in value:
      raise InvalidField(name, f"{name} is missing: a batch line has custom_id, method, url "
                         "and body", "missing_field")
  if value["method"] != "POST":
    fields_lib.reject("method", '"POST"', value["method"])
  if not isinstance(value["url"], str) or value["url"] not in _URLS:
    fields_lib.reject("url", " or ".join(_URLS), value["url"])
  if not isinstance(value["body"], dict):
    fields_lib.reject("body", "an object", value["body"])
  return _URLS[value["url"]], {k: v for k, v in value["body"].items() if v is not None}


def _model(fields: dict[str, Any], model_name: str) -> str:
  model = fields.get("model", model_name)
  if not isinstance(model, str):
    fields_lib.reject("model", "a string", model)
  if model_name and model != model_name:
    raise InvalidField("model", f"model is {model!r}, but this job runs {model_name!r}: change the "
                       "row, or set model.name of the job to what the rows say", "model_not_found")
  return model


def _echo(fields: dict[str, Any]) -> bool:
  echo = fields_lib.flag(fields, "echo")
  if echo and "messages" in fields:
    raise InvalidField("echo", "echo needs a prompt, not messages: remove it", "unsupported")
  return echo
