"""What one request leaves in the output file: its completion, or why there is none.

The objects depend on the input and the model alone. They hold no times and no
random ids, so a job that was killed and resumed writes the same bytes as one
that ran through: `created` is 0, and ids are hashes of the job's and the request's.
"""

from collections.abc import Callable, Sequence
import hashlib
from typing import Any

from batchjax.io import logprobs
from batchjax.io.records import RowError
from batchjax.io.store import StoredRow
from batchjax.types import NOT_FINITE, Choice, Completion

DecodeFn = Callable[..., str]  # (token_ids, *, is_continuation: bool), as `Tokenizer.decode`
TokenBytesFn = Callable[[int], bytes]


def format_completion(row: StoredRow, completion: Completion, *, decode_fn: DecodeFn,
                      token_bytes_fn: TokenBytesFn, job_id: str) -> dict[str, Any]:
  """The output object of a request, in the form in which its row asked.

  Args:
    row: what was asked.
    completion: what was generated.
    decode_fn: text of token ids; `is_continuation` says that they follow a prompt.
    token_bytes_fn: the bytes that one token stands for.
    job_id: `Job.id`.

  Returns:
    For an OpenAI batch row `{"id", "custom_id", "response", "error": None}`
    with the API's response object; for a plain row `{"id", "text",
    "finish_reason", "usage"}`, with `choices` in place of text and finish
    reason where n > 1. `usage...cached_tokens` is the completion's number.
  """
  format_fn = _plain if row.form == "plain" else _batch
  return format_fn(row, completion, decode_fn, token_bytes_fn, job_id)


def completion_error(row: StoredRow, completion: Completion) -> RowError | None:
  """Why a completion is no answer; None where it is one."""
  if all(choice.finish_reason != "error" for choice in completion.choices):
    return None
  return RowError(row.index, row.row, row.request.request_id, "", NOT_FINITE, "model_error")


def format_error(error: RowError, *, job_id: str) -> dict[str, Any]:
  """The object of a row in the error file; `row` counts the input's rows from 1."""
  details = {"code": error.code, "message": error.message, "param": error.field or None,
             "row": error.row}
  digest = _digest(job_id, "row", str(error.row))
  return {"id": f"batch_req_{digest}", "custom_id": error.request_id,
          "response": {"status_code": 500 if error.code == "model_error" else 400, "request_id": f"req_{digest}",
                       "body": {"error": details}},
          "error": details}


def choice_text(choice: Choice, stop: tuple[str, ...], decode_fn: DecodeFn,
                echoed: Sequence[int] = ()) -> str:
  """The text of a sample behind its echoed prompt, cut before the stop string that ended it.

  That is the string which the last token completed, the first one if several.
  """
  tokens = [*echoed, *choice.token_ids.tolist()]

  def settled_len(token_ids: Sequence[int]) -> int:
    # A character whose last bytes are still to come is not part of the text yet.
    return len(decode_fn(token_ids, is_continuation=not echoed).rstrip("\ufffd"))

  text = decode_fn(tokens, is_continuation=not echoed)
  if choice.finish_reason != "stop" or not stop or not len(choice.token_ids):
    return text
  before_last, prompt_len = settled_len(tokens[:-1]), settled_len(echoed) if echoed else 0
  found = [(start + len(string), start) for string in stop
           if (start := text.find(string, max(prompt_len, before_last - len(string) + 1))) >= 0]
  return text[:min(found)[1]] if found else text


def _digest(job_id: str, kind: str, name: str) -> str:
  return hashlib.blake2b(f"{job_id}:{kind}:{name}".encode(), digest_size=12).hexdigest()


def _usage(completion: Completion) -> dict[str, Any]:
  num_generated = sum(len(choice.token_ids) for choice in completion.choices)
  return {"prompt_tokens": completion.num_prompt_tokens,
          "completion_tokens": num_generated,
          "total_tokens": completion.num_prompt_tokens + num_generated,
          "prompt_tokens_details": {"cached_tokens": completion.num_cached_tokens}}


def _batch(row: StoredRow, completion: Completion, decode_fn: DecodeFn,
           token_bytes_fn: TokenBytesFn, job_id: str) -> dict[str, Any]:
  digest = _digest(job_id, "request", row.request.request_id)
  is_chat = row.form == "chat"
  choice_fn = _chat_choice if is_chat else _completions_choice
  body = {
      "id": f"{'chatcmpl' if is_chat else 'cmpl'}-{digest}",
      "object": "chat.completion" if is_chat else "text_completion",
      "created": 0,
      "model": row.model,
      "choices": [choice_fn(row, completion, choice, decode_fn, token_bytes_fn)
                  for choice in completion.choices],
      "usage": _usage(completion),
  }
  return {"id": f"batch_req_{digest}", "custom_id": row.request.request_id,
          "response": {"status_code": 200, "request_id": f"req_{digest}", "body": body},
          "error": None}


def _chat_choice(row: StoredRow, completion: Completion, choice: Choice, decode_fn: DecodeFn,
                 token_bytes_fn: TokenBytesFn) -> dict[str, Any]:
  return {"index": choice.index,
          "message": {"role": "assistant", "content": _text(row, choice, decode_fn)},
          "finish_reason": choice.finish_reason,
          "logprobs": logprobs.chat(logprobs.of_choice(choice), token_bytes_fn),
          **_ids(row, choice)}


def _completions_choice(row: StoredRow, completion: Completion, choice: Choice,
                        decode_fn: DecodeFn, token_bytes_fn: TokenBytesFn) -> dict[str, Any]:
  text = _text(row, choice, decode_fn)
  scores = logprobs.of_choice(choice)
  if row.echo:
    prompt = logprobs.of_prompt(row.request, completion)
    scores = prompt and scores and prompt + scores
  return {"index": choice.index,
          "text": text,
          "finish_reason": choice.finish_reason,
          "logprobs": logprobs.completions(scores, token_bytes_fn, len(text)),
          **_ids(row, choice)}


def _plain(row: StoredRow, completion: Completion, decode_fn: DecodeFn,
           token_bytes_fn: TokenBytesFn, job_id: str) -> dict[str, Any]:
  choices = []
  for choice in completion.choices:
    fields = {"text": _text(row, choice, decode_fn), "finish_reason": choice.finish_reason,
              **_ids(row, choice)}
    if choice.logprobs is not None:
      fields["logprobs"] = logprobs.plain(logprobs.of_choice(choice), token_bytes_fn)
    choices.append(fields)
  if len(choices) > 1:
    choices = [{"index": choice.index, **fields}
               for choice, fields in zip(completion.choices, choices)]
  prompt = logprobs.of_prompt(row.request, completion)
  return {"id": row.request.request_id,
          **(choices[0] if len(choices) == 1 else {"choices": choices}),
          **({"prompt_logprobs": logprobs.plain(prompt, token_bytes_fn)} if prompt else {}),
          "usage": _usage(completion)}


def _text(row: StoredRow, choice: Choice, decode_fn: DecodeFn) -> str:
  echoed = row.request.prompt_token_ids.tolist() if row.echo else ()
  return choice_text(choice, row.request.sampling_params.stop, decode_fn, echoed)


def _ids(row: StoredRow, choice: Choice) -> dict[str, Any]:
  return {"token_ids": choice.token_ids.tolist()} if row.return_token_ids else {}
