"""The fields that a row may have, and how they become SamplingParams."""

import dataclasses
import difflib
import functools
import hashlib
import json
import re
from typing import Any, Literal, NoReturn

from batchjax.config import RowLimits
from batchjax.io.schemas import OUTPUT_NAMES
from batchjax.types import SamplingParams

Form = Literal["chat", "completions", "plain", "score", "choices", "document"]

_INTEGERS = {"top_k", "n", "max_tokens", "max_completion_tokens", "min_tokens", "seed",
             "top_logprobs"}

# They change no completion.
_IGNORED = {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"}
_SCALARS = {"temperature", "top_k", "top_p", "min_p", "n", "max_tokens", "min_tokens", "ignore_eos",
            "presence_penalty", "frequency_penalty", "repetition_penalty"}
_COMMON = _IGNORED | _SCALARS | {
    "model", "seed", "stop", "stop_token_ids", "logit_bias", "logprobs", "max_completion_tokens",
    "return_token_ids", "stream"}
_CHAT = {"messages", "tools", "chat_template_kwargs"}
FIELDS: dict[Form, set[str]] = {
    "chat": _COMMON | _CHAT | {"top_logprobs"},
    "completions": _COMMON | {"prompt", "echo"},
    "plain": _COMMON | _CHAT | {"id", "prompt", "prompt_token_ids", "echo", "top_logprobs",
                                "prompt_logprobs"},
    "score": _IGNORED | _CHAT | {"id", "model", "prompt", "prompt_token_ids", "text", "continuation",
                                 "continuations", "continuation_token_ids"},
}
READ = {form: FIELDS[form] - _IGNORED for form in ("plain", "score")}
ENVELOPE = {"custom_id", "method", "url", "body"}  # of an OpenAI batch line
_OTHER_URL = {"chat": "/v1/completions", "completions": "/v1/chat/completions"}
# Fields of the OpenAI API that change what a completion is, so that none may be dropped in silence.
_UNSUPPORTED = {"response_format", "tool_choice", "functions", "function_call", "best_of", "suffix",
                "parallel_tool_calls", "modalities", "audio", "prediction", "reasoning_effort",
                "web_search_options", "stream_options", "verbosity",
                # of other engines
                "do_sample", "num_beams", "use_beam_search", "length_penalty", "early_stopping",
                "no_repeat_ngram_size", "typical_p", "top_a", "mirostat", "bad_words",
                "allowed_token_ids", "logits_processors", "guided_json", "guided_regex",
                "guided_choice", "guided_grammar", "structured_outputs", "grammar", "json_schema",
                "truncate_prompt_tokens", "include_stop_str_in_output", "skip_special_tokens",
                "add_generation_prompt", "continue_final_message", "chat_template"}
# What other engines call a field.
_OTHER_NAMES = {
    **dict.fromkeys(("max_new_tokens", "max_output_tokens", "max_length", "max_gen_len", "n_predict",
                     "num_predict"), "max_tokens"),
    **dict.fromkeys(("min_new_tokens", "min_length"), "min_tokens"),
    **dict.fromkeys(("stop_sequences", "stop_strings", "stop_words"), "stop"),
    **dict.fromkeys(("repeat_penalty", "rep_pen"), "repetition_penalty"),
    **dict.fromkeys(("num_return_sequences", "num_samples", "num_completions"), "n"),
    "temp": "temperature", "random_seed": "seed", "input_ids": "prompt_token_ids",
    "eos_token_id": "stop_token_ids"}
# From here on two names are taken for one misspelt; "prompt_id" and "prompt" are 0.857.
_LEAST_LIKENESS, _LONGEST_LIKE = 0.86, 40


class InvalidField(ValueError):
  """One field of a row is wrong; becomes a RowError where the row is known."""

  def __init__(self, field: str, message: str, code: str = "invalid_value"):
    super().__init__(message)
    self.field, self.code = field, code


def one_line(error: BaseException) -> str:
  """The type of an exception and the first of its words."""
  words = " ".join(str(error).split())
  return f"{type(error).__name__}: {words[:200]}" if words else type(error).__name__


def reject(field: str, rule: str, value: Any) -> NoReturn:
  """Raises InvalidField that says what the field must be and shows its value, cut short."""
  try:
    shown = json.dumps(value, ensure_ascii=False, default=repr)
  except (RecursionError, TypeError, ValueError):  # nested too deeply, or keys that JSON lacks
    shown = f"a {type(value).__name__}"
  raise InvalidField(field, f"{field} must be {rule}, got {shown[:60]}{'…' * (len(shown) > 60)}")


def require_at_most(field: str, count: int, unit: str, limits: RowLimits, limit: str) -> None:
  """Raises InvalidField where a row asks for more than `limits.<limit>`."""
  most = getattr(limits, limit)
  if count > most:
    shown = str(count) if count < 10**12 else "more than a trillion"
    raise InvalidField(field, f"{field}: {shown} {unit} are more than limits.{limit}={most}: use "
                       "fewer, or raise the limit", "limit_exceeded")


def whole(value: Any) -> Any:
  """A float without a fraction as the integer that it is; any other value as it stands.

  Columns of integers with gaps are floats in the files that many programs write.
  """
  return int(value) if isinstance(value, float) and value.is_integer() else value


def check_sizes(fields: dict[str, Any], limits: RowLimits) -> None:
  """Raises InvalidField where a value is longer than the limits allow, whatever else it is."""
  for name in set(fields) - FIELDS["plain"]:
    if len(name) > limits.max_name_chars:
      require_at_most(f"{name[:40]}…", len(name), "characters", limits, "max_name_chars")
  for name, unit, limit in (("messages", "messages", "max_messages"),
                            ("stop_token_ids", "tokens", "max_stop_token_ids"),
                            ("logit_bias", "tokens", "max_logit_bias"),
                            ("model", "characters", "max_name_chars")):
    if isinstance(fields.get(name), (str, list, dict)):
      require_at_most(name, len(fields[name]), unit, limits, limit)
  stop = fields.get("stop")
  texts = {"stop": stop}
  if isinstance(stop, list):
    require_at_most("stop", len(stop), "strings", limits, "max_stop_strings")
    texts = {f"stop[{i}]": text for i, text in enumerate(stop)}
  for name, text in texts.items():
    if isinstance(text, str):
      require_at_most(name, len(text), "characters", limits, "max_stop_chars")


@functools.lru_cache(4096)  # most rows have the same fields
def _near(name: str, form: Form) -> tuple[str, ...]:
  """The fields that a name is likely to mean; in rows that carry others only where it can be nothing else."""
  if form != "score" and name in _OTHER_NAMES:
    return (_OTHER_NAMES[name],)
  if form not in READ:
    return tuple(difflib.get_close_matches(name, sorted(FIELDS[form])))
  spelt = {_letters(field): field for field in sorted(READ[form])}
  return tuple(spelt[letters] for letters in difflib.get_close_matches(
      _letters(name), spelt, cutoff=_LEAST_LIKENESS))


def is_carried(name: str, form: Form) -> bool:
  """Whether a row ("plain" or "score") may have a field that is not read, and that its output gets as it is."""
  return not (name in READ[form] or name in READ["plain"] or name in OUTPUT_NAMES[form] or name in ENVELOPE
              or form == "plain" and name in _UNSUPPORTED
              or len(name) <= _LONGEST_LIKE and _near(name, form))


def _letters(name: str) -> str:
  return re.sub(r"[\W_]", "", name.lower())


def check_names(fields: dict[str, Any], form: Form) -> None:
  """Raises InvalidField for a field that this form does not have, naming near misses.

  A row that is no request of the API may have any that `is_carried`.
  """
  for name in sorted(set(fields) - FIELDS[form]):
    if form in READ and is_carried(name, form):
      continue
    if name in _UNSUPPORTED:
      raise InvalidField(name, f"{name} is not supported: remove it", "unsupported")
    other = _OTHER_URL.get(form)
    if other and name in FIELDS["completions" if form == "chat" else "chat"]:
      raise InvalidField(name, f"{name} belongs to requests of {other}: change the url, or remove "
                         f"{name}", "unknown_field")
    if form in READ and name in OUTPUT_NAMES[form] and name not in ENVELOPE:
      raise InvalidField(name, f"{name} is a field of the output: rename it, or move it into metadata, "
                         "which is carried through", "unknown_field")
    near = _near(name, form)
    remedy = (f"did you mean {' or '.join(near)}? What is to be carried through goes into metadata"
              if near else "remove it, or move it into metadata, which is carried through")
    where = {"plain": "this row", "score": "a row to score"}.get(
        form, f"the body of a {form} request")
    raise InvalidField(name, f"{name} is not a field of {where}: {remedy}", "unknown_field")
  if fields.get("stream", False) is not False:
    raise InvalidField("stream", "stream must be false or left out: a batch job writes whole "
                       "completions", "unsupported")


def sampling_params(fields: dict[str, Any], form: Form, defaults: SamplingParams, *,
                    limits: RowLimits, job_seed: int, request_id: str) -> SamplingParams:
  """The row's sampling parameters; what it leaves out is taken from `defaults`.

  Only `seed` is not: without one the row draws from a hash of the job's seed
  and the request id, so that it depends on no other row.
  """
  fields = {name: whole(value) if name in _INTEGERS else value for name, value in fields.items()}
  given = {name: fields[name] for name in _SCALARS & set(fields)}
  if "max_completion_tokens" in fields:
    if fields.get("max_tokens", fields["max_completion_tokens"]) != fields["max_completion_tokens"]:
      raise InvalidField("max_completion_tokens", "max_tokens and max_completion_tokens differ: "
                         "give one of them")
    given["max_tokens"] = fields["max_completion_tokens"]
  given["seed"] = fields.get("seed", stable_seed(job_seed, request_id))
  if "stop" in fields:
    given["stop"] = _stop_strings(fields["stop"])
  if "stop_token_ids" in fields:
    given["stop_token_ids"] = tuple(token_ids("stop_token_ids", fields["stop_token_ids"]))
  if "logit_bias" in fields:
    given["logit_bias"] = _logit_bias(fields["logit_bias"])
  given.update(_logprobs(fields, form, defaults))
  for name, field, unit in (("n", "n", "samples"),
                            ("top_logprobs", "logprobs" if form == "completions" else
                             "top_logprobs", "alternatives per token")):
    if type(count := given.get(name, getattr(defaults, name))) is int:
      require_at_most(field, count, unit, limits, f"max_{name}")
  try:
    return dataclasses.replace(defaults, **given)
  except ValueError as e:
    raise InvalidField(str(e).split(maxsplit=1)[0], str(e)) from e


def stable_seed(job_seed: int, request_id: str) -> int:
  """A 32-bit hash of both, the same on every machine and in every run."""
  digest = hashlib.blake2b(f"{job_seed}:{request_id}".encode(), digest_size=4).digest()
  return int.from_bytes(digest, "little")


def token_ids(field: str, value: Any) -> list[int]:
  """The value as a list of token ids; raises InvalidField where it is none."""
  if not isinstance(value, list):
    reject(field, "a list of token ids", value)
  value = [whole(token) for token in value] if any(
      type(token) is float for token in value) else value
  for i, token in enumerate(value):
    if type(token) is not int or not 0 <= token < 2**31:
      reject(f"{field}[{i}]", "a token id, an integer of at least 0", token)
  return value


def flag(fields: dict[str, Any], name: str) -> bool:
  """A field that is true or false, false where it is absent."""
  value = fields.get(name, False)
  if not isinstance(value, bool):
    reject(name, "true or false", value)
  return value


def _stop_strings(value: Any) -> tuple[str, ...]:
  texts = [value] if isinstance(value, str) else value
  if not isinstance(texts, list) or not all(isinstance(text, str) and text for text in texts):
    reject("stop", "a non-empty string or a list of them", value)
  return tuple(texts)


def _logit_bias(value: Any) -> tuple[tuple[int, float], ...]:
  if not isinstance(value, dict):
    reject("logit_bias", 'an object such as {"50256": -100}', value)
  bias_of = {str(token): bias for token, bias in value.items()}
  for token, bias in bias_of.items():
    if not (token.isascii() and token.isdecimal() and len(token) < 20 and int(token) < 2**31):
      reject("logit_bias", "keyed by token ids written as strings", token)
    if type(bias) not in (int, float) or not -100 <= bias <= 100:
      reject(f"logit_bias[{token}]", "a number between -100 and 100", bias)
  return tuple((int(token), float(bias)) for token, bias in bias_of.items())


def _logprobs(fields: dict[str, Any], form: Form, defaults: SamplingParams) -> dict[str, Any]:
  """The three log-probability settings; each OpenAI form can return only some of them."""
  if form == "completions":
    count = whole(fields.get("logprobs"))
    if count is None:
      logprobs, top = defaults.logprobs, defaults.top_logprobs if defaults.logprobs else 0
    elif type(count) is not int or count < 0:
      reject("logprobs", "the number of alternatives per token, an integer of at least 0", count)
    else:
      logprobs, top = True, count
    return {"logprobs": logprobs, "top_logprobs": top,
            "prompt_logprobs": logprobs and flag(fields, "echo")}
  if not isinstance(fields.get("logprobs", False), bool):
    reject("logprobs", "true or false (top_logprobs sets the number of alternatives)",
           fields["logprobs"])
  logprobs = fields.get("logprobs", defaults.logprobs)
  prompt = form == "plain" and fields.get("prompt_logprobs", defaults.prompt_logprobs)
  top = fields.get("top_logprobs", defaults.top_logprobs if logprobs or prompt else 0)
  return {"logprobs": logprobs, "top_logprobs": top, "prompt_logprobs": prompt}
