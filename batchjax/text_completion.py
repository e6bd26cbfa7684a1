"""Text in, text out, from Python: the rows, defaults and texts of a job, without its files."""

from collections.abc import Iterable, Mapping, Sequence
import dataclasses
import os
from typing import Any, NamedTuple

import jax
import numpy as np
from rich.console import Console
from rich.progress import track

from batchjax import hub
from batchjax.config import ConfigError, EngineConfig, from_config_dict, JobConfig, ModelSource
from batchjax.engine.device import chip_of, memory_limit
from batchjax.generation import generate
from batchjax.io.output import choice_text
from batchjax.io.records import Record, RowError
from batchjax.jobs.loaders import Loaders
from batchjax.jobs.prepare import prepare_rows
from batchjax.plan.memory import settle
from batchjax.text.tokenizer import Tokenizer
from batchjax.types import Choice, Completion, Request
from batchjax.weights import Model

# What a job calls its model's place; nothing is read from it.
_LOADED = ModelSource(path="a model that is loaded")


class Loaded(NamedTuple):
  """A model with its tokenizer, as `load` returns them; `model, tokenizer = batchjax.load(path)`.

  Attributes:
    model: its `config.eos_token_ids` are those of the model and of the tokenizer.
    tokenizer: text to token ids and back.

  >>> loaded = batchjax.load(path)
  >>> trained = loaded._replace(model=jax.tree.map(lambda p: 0.99 * p, loaded.model))
  >>> len(batchjax.complete(trained, "The end", max_tokens=4, temperature=0)[0].token_ids)
  4
  """

  model: Model
  tokenizer: Tokenizer


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextChoice(Choice):
  """One sample of a prompt, a `Choice` with its text.

  Attributes:
    text: what the tokens spell, cut before the stop string that ended it.

  >>> choice = batchjax.complete(loaded, "The end", max_tokens=6, temperature=0)[0].choices[0]
  >>> choice.text == loaded.tokenizer.decode(choice.token_ids, is_continuation=True)
  True
  """

  text: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextCompletion(Completion):
  """All samples of one prompt, a `Completion` with texts; its own text is that of the first sample.

  Attributes:
    choices: its n samples in order of their index.
    prompt_token_ids: i32[prompt_len], what the prompt became.

  >>> completion = batchjax.complete(loaded, "The end", n=2, max_tokens=3, temperature=0)[0]
  >>> completion.text == completion.choices[0].text == completion.choices[1].text
  True
  >>> len(completion.prompt_token_ids), len(completion.token_ids), completion.finish_reason
  (8, 3, 'length')
  """

  choices: tuple[TextChoice, ...]
  prompt_token_ids: np.ndarray

  @property
  def text(self) -> str:
    """Text of the first sample."""
    return self.choices[0].text

  @property
  def token_ids(self) -> np.ndarray:
    """i32[len], tokens of the first sample."""
    return self.choices[0].token_ids

  @property
  def finish_reason(self) -> str:
    """Of the first sample."""
    return self.choices[0].finish_reason


def load(path: str | os.PathLike = "", **fields: Any) -> Loaded:
  """Loads a model and its tokenizer onto the default device.

  Args:
    path: a Hugging Face folder, a .gguf file, an Orbax checkpoint, or a name of the Hub: org/name.
    **fields: further fields of `ModelSource`, as `dtype="bfloat16"` or `tokenizer="folder"`.

  Raises:
    ConfigError: there is no model or tokenizer that is known, or it is damaged.

  >>> loaded = batchjax.load(path, dtype="bfloat16")
  >>> loaded.tokenizer.decode(loaded.tokenizer.encode("The end"))
  'The end'
  """
  source = from_config_dict(ModelSource, {"path": os.fspath(path), **fields}, "load")
  source, loaders = hub.pin(source), Loaders()  # both parts of one commit
  config, tokenizer = loaders.read(source)
  return Loaded(loaders.load(source, config), tokenizer)


def complete(loaded: tuple[Model, Tokenizer], prompts: Any, *, seed: int = 0,
             engine: EngineConfig = EngineConfig(), chat_template: str = "", progress: bool = False,
             **fields: Any) -> list[TextCompletion]:
  """Completes prompts; all are planned together, so give them in one call.

  A later call that needs the same shapes compiles nothing, with other parameters of the model too.
  What a field means and may be is what it is in a file of plain rows.

  Args:
    loaded: model and tokenizer.
    prompts: one prompt or a list of them. A prompt is a text, chat messages (a list of dicts with
      role and content), token ids, or a row: a dict with one of `prompt`, `messages` and
      `prompt_token_ids` and fields of its own, which win over `fields`.
    seed: of the job: each prompt draws with a seed made of it and its place (or `id`). The same
      call gives the same texts, another seed others.
    engine: limits and sizes.
    chat_template: path of a jinja2 template that replaces the model's own.
    progress: show a bar on standard error.
    **fields: sampling fields for every prompt: temperature, top_k, top_p, min_p, n, max_tokens,
      min_tokens, stop, stop_token_ids, ignore_eos, presence_penalty, frequency_penalty,
      repetition_penalty, logit_bias, logprobs, top_logprobs, prompt_logprobs, echo; for messages
      tools and chat_template_kwargs. Defaults are those of `SamplingParams`; the default
      `max_tokens` shrinks to the room in the context.

  Returns:
    A completion for each prompt, in their order. A sample with the finish reason "error" met logits
    that are not finite.

  Raises:
    ConfigError: a prompt or a field is not as it must be, with place and remedy, or the engine does
      not fit the device.

  >>> for completion in batchjax.complete(loaded, ["The", "An"], temperature=0, max_tokens=4):
  ...   print(completion.finish_reason, len(completion.token_ids))
  length 4
  length 4
  >>> messages = [{"role": "user", "content": "What is the time?"}]
  >>> completion, = batchjax.complete(loaded, messages, n=3, stop=["a", "e"], max_tokens=4,
  ...                                 temperature=0)
  >>> len(completion.choices)
  3
  >>> rows = [{"prompt": "The", "max_tokens": 2}, {"prompt": "An", "max_tokens": 3}]
  >>> [len(c.token_ids) for c in batchjax.complete(loaded, rows, temperature=0)]
  [2, 3]
  >>> batchjax.complete(loaded, ["The", ""])
  Traceback (most recent call last):
  ...
  batchjax.config.ConfigError: prompts[1]: prompt is empty: give it at least one character
  """
  model, tokenizer = loaded
  device = jax.devices()[0]
  engine = settle(model.config, engine, chip_of(device), memory_limit(device, model.params))
  config = JobConfig(_LOADED, engine, chat_template=chat_template, seed=seed)
  records = (Record(i, i + 1, _row(prompt, fields)) for i, prompt in enumerate(_each(prompts)))
  requests, echoed = [], []
  for prepared in prepare_rows(records, config, model.config, tokenizer):
    if isinstance(prepared, RowError):
      raise ConfigError(f"prompts[{prepared.index}]: {prepared.message}")
    (row, token_ids), = prepared
    requests.append(Request(row.request_id, token_ids, row.sampling_params))
    echoed.append(token_ids.tolist() if row.echo else [])
  completions = generate(model, requests, engine, tokenizer=tokenizer)
  shown = track(completions, "completing", len(requests), console=Console(stderr=True),
                disable=not progress)
  done = {completion.request_id: completion for completion in shown}
  return [_with_texts(request, done[request.request_id], tokenizer, prefix)
          for request, prefix in zip(requests, echoed)]


def _each(prompts: Any) -> Iterable[Any]:
  """The prompts, where one by itself may have been given."""
  if not isinstance(prompts, Iterable):
    raise ConfigError("prompts must be a text, messages, token ids, a row, or a list of these, got "
                      f"{prompts!r}")
  is_one = isinstance(prompts, (str, Mapping))
  if not is_one and isinstance(prompts, Sequence) and prompts:
    first = prompts[0]  # of a chat, or of token ids
    is_one = isinstance(first, Mapping) and "role" in first or isinstance(first, (int, np.integer))
  return [prompts] if is_one or getattr(prompts, "ndim", 0) == 1 else prompts


def _row(prompt: Any, fields: Mapping[str, Any]) -> dict[str, Any]:
  """The prompt as a plain row of a file."""
  if isinstance(prompt, Mapping):
    given = prompt
  elif isinstance(prompt, str):
    given = {"prompt": prompt}
  elif isinstance(prompt, Sequence) and prompt and isinstance(prompt[0], Mapping):
    given = {"messages": prompt}
  else:
    given = {"prompt_token_ids": prompt}
  return {name: _plain(value) for name, value in {**fields, **given}.items()}


def _plain(value: Any) -> Any:
  """Tuples, numpy and JAX arrays as what JSON has in their place."""
  value = value.tolist() if hasattr(value, "tolist") else value
  return [_plain(item) for item in value] if isinstance(value, tuple) else value


def _with_texts(request: Request, completion: Completion, tokenizer: Tokenizer,
                echoed: list[int]) -> TextCompletion:
  def text(choice: Choice) -> str:
    return choice_text(choice, request.sampling_params.stop,
                       tokenizer.text_pieces(choice.token_ids.tolist(), echoed))

  choices = tuple(TextChoice(**_fields(choice), text=text(choice)) for choice in completion.choices)
  return TextCompletion(**_fields(completion) | {"choices": choices},
                        prompt_token_ids=request.prompt_token_ids)


def _fields(value: Any) -> dict[str, Any]:
  """The fields of a dataclass, as they are."""
  return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
