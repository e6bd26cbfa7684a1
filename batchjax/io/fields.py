"""The fields that a row may have, and how they become SamplingParams."""

import dataclasses
import difflib
import hashlib
import json
from typing import Any, Literal, NoReturn

from batchjax.types import SamplingParams

Form = Literal["chat", "completions", "plain"]

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
}
_OTHER_URL = {"chat": "/v1/completions", "completions": "/v1/chat/completions"}
# Fields of the OpenAI API that change what a completion is, so that none may be dropped in silence.
_UNSUPPORTED = {"response_format", "tool_choice", "functions", "function_call", "best_of", "suffix",
                "parallel_tool_calls", "modalities", "audio", "prediction", "reasoning_effort",
                "web_search_options", "stream_options", "verbosity"}


class InvalidField(ValueError):
  """One field of a row is wrong; becomes a RowError where the row is known."""

  def __init__(self, field: str, message: str, code: str = "invalid_value"):
    super().__init__(message)
    self.field, self.code = field, code


def reject(field: str, rule: str, value: Any) -> NoReturn:
  """Raises InvalidField that says what the field must be and shows its value, cut short."""
  shown = json.dumps(value, ensure_ascii=False, default=repr)
  raise InvalidField(field, f"{field} must be {rule}, got {shown[:60]}{'…' * (len(shown) > 60)}")


def check_names(fields: dict[str, Any], form: Form) -> None:
  """Raises InvalidField for a field that this form does not have, naming near misses."""
  for name in sorted(set(fields) - FIELDS[form]):
    if name in _UNSUPPORTED:
      raise InvalidField(name, f"{name} is not supported: remove it", "unsupported")
    other = _OTHER_URL.get(form)
    if other and name in FIELDS["completions" if form == "chat" else "chat"]:
      raise InvalidField(name, f"{name} belongs to requests of {other}: change the url, or remove "
                         f"{name}", "unknown_field")
    near = difflib.get_close_matches(name, sorted(FIELDS[form]))
    remedy = f"did you mean {' or '.join(near)}?" if near else (
        "remove it, or move it into metadata, which is ignored")
    where = "this row" if form == "plain" else f"the body of a {form} request"
    raise InvalidField(name, f"{name} is not a field of {where}: {remedy}", "unknown_field")
  if fields.get("stream", False) is not False:
    raise InvalidField("stream", "stream must be false or left out: a batch job writes whole "
                       "completions", "unsupported")


def sampling_params(fields: dict[str, Any], form: Form, defaults: SamplingParams, *,
                    job_seed: int, request_id: str) -> SamplingParams:
  """The row's sampling parameters; what it leaves out is taken from `defaults`.

  Only `seed` is not: without one the row draws from a hash of the job's seed
  and the request id, so that it depends on no other row.
  """
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
  try:
    return dataclasses.replace(defaults, **given)
  except ValueError as e:
    raise InvalidField(str(e).split(maxsplit=1)[0], str(e)) from e


def stable_seed(job_seed: int, request_id: str) -> int:
  """A 32-bit hash of both, the same on every machine and in every run."""
  digest = hashlib.blake2b(f"{job_seed}:{request_id}".encode(), digest_size=4).digest()
  return int.from_bytes(digest, "little")


def token_ids(field: str, value: Any) -> list[int]:
  """The value if it is a list of token ids; raises InvalidField otherwise."""
  if not isinstance(value, list):
    reject(field, "a list of token ids", value)
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
    if not (token.isascii() and token.isdecimal() and int(token) < 2**31):
      reject("logit_bias", "keyed by token ids written as strings", token)
    if type(bias) not in (int, float) or not -100 <= bias <= 100:
      reject(f"logit_bias[{token}]", "a number between -100 and 100", bias)
  return tuple((int(token), float(bias)) for token, bias in bias_of.items())


def _logprobs(fields: dict[str, Any], form: Form, defaults: SamplingParams) -> dict[str, Any]:
  """The three log-probability settings; each OpenAI form can return only some of them."""
  if form == "completions":
    count = fields.get("logprobs")
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
