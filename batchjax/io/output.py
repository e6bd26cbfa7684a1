"""What one request leaves in the output file: its completion, or why there is none.

The objects depend on the input and the model alone. They hold no times and no
random ids, so a job that was killed and resumed writes the same bytes as one
that ran through: `created` is 0, and ids are hashes of the job's and the request's.
"""

from collections.abc import Sequence
import hashlib
from typing import Any

from batchjax.io import logprobs
from batchjax.io import scores as scores_lib
from batchjax.io.records import RowError
from batchjax.io.store import StoredRow
from batchjax.text.tokenizer import Tokenizer
from batchjax.types import NOT_FINITE, Choice, Completion


def format_answer(answers: Sequence[tuple[StoredRow, Completion]], *, tokenizer: Tokenizer,
                  job_id: str) -> dict[str, Any]:
  """The output object of a row; `answers` are its requests, one unless several texts are scored."""
  row, completion = answers[0]
  if row.form in ("score", "choices", "document"):
    return scores_lib.format_scores(answers)
  return format_completion(row, completion, tokenizer=tokenizer, job_id=job_id)


def format_completion(row: StoredRow, completion: Completion, *, tokenizer: Tokenizer,
                      job_id: str) -> dict[str, Any]:
  """The output object of a request, in the form in which its row asked.

  Args:
    row: what was asked.
    completion: what was generated.
    tokenizer: of the model.
    job_id: `Job.id`.

  Returns:
    For an OpenAI batch row `{"id", "custom_id", "response", "error": None}`
    with the API's response object; for a plain row `{"id", "text",
    "finish_reason", "usage"}`, with `choices` in place of text and finish
    reason where n > 1. `usage...cached_tokens` is the completion's number.
    What the row carries is added as the file is written (`io.carried`).
  """
  format_fn = _plain if row.form == "plain" else _batch
  return format_fn(row, completion, tokenizer, job_id)


def completion_error(row: StoredRow, completion: Completion) -> RowError | None:
  """Why a completion is no answer; None where it is one."""
  if all(choice.finish_reason != "error" for choice in completion.choices):
    return None
  return RowError(row.index, row.row, scores_lib.row_id(row), "", NOT_FINITE, "model_error")


def format_error(error: RowError, *, job_id: str) -> dict[str, Any]:
  """The object of a row in the error file; `row` counts the input's rows from 1."""
  details = {"code": error.code, "message": error.message, "param": error.field or None,
             "row": error.row}
  digest = _digest(job_id, "row", str(error.row))
  return {"id": f"batch_req_{digest}", "custom_id": error.request_id,
          "response": {"status_code": 500 if error.code == "model_error" else 400, "request_id": f"req_{digest}",
                       "body": {"error": details}},
          "error": details}


def choice_text(choice: Choice, stop: tuple[str, ...], pieces: Sequence[bytes]) -> str:
  """The text of a sample, cut before the stop string that ended it.

  That is the string which the last token completed, the first one if several.

  Args:
    choice: the sample.
    stop: the request's stop strings.
    pieces: what each token adds to the text, those of an echoed prompt first.
  """
  text = _decode(pieces)
  if choice.finish_reason != "stop" or not stop or not len(choice.token_ids):
    return text

  def settled_len(pieces: Sequence[bytes]) -> int:
    # A character whose last bytes are still to come is not part of the text yet.
    return len(_decode(pieces).rstrip("\ufffd"))

  before_last = settled_len(pieces[:-1])
  prompt_len = settled_len(pieces[:len(pieces) - len(choice.token_ids)])
  found = [(start + len(string), start) for string in stop
           if (start := text.find(string, max(prompt_len, before_last - len(string) + 1))) >= 0]
  return text[:min(found)[1]] if found else text


def _decode(pieces: Sequence[bytes]) -> str:
  return b"".join(pieces).decode("utf-8", errors="replace")


def _digest(job_id: str, kind: str, name: str) -> str:
  return hashlib.blake2b(f"{job_id}:{kind}:{name}".encode(), digest_size=12).hexdigest()


def _usage(completion: Completion) -> dict[str, Any]:
  num_generated = sum(len(choice.token_ids) for choice in completion.choices)
  return {"prompt_tokens": completion.num_prompt_tokens,
          "completion_tokens": num_generated,
          "total_tokens": completion.num_prompt_tokens + num_generated,
          "prompt_tokens_details": {"cached_tokens": completion.num_cached_tokens}}


def _batch(row: StoredRow, completion: Completion, tokenizer: Tokenizer,
           job_id: str) -> dict[str, Any]:
  digest = _digest(job_id, "request", row.request.request_id)
  is_chat = row.form == "chat"
  choice_fn = _chat_choice if is_chat else _completions_choice
  body = {
      "id": f"{'chatcmpl' if is_chat else 'cmpl'}-{digest}",
      "object": "chat.completion" if is_chat else "text_completion",
      "created": 0,
      "model": row.model,
      "choices": [choice_fn(row, completion, choice, tokenizer)
                  for choice in completion.choices],
      "usage": _usage(completion),
  }
  return {"id": f"batch_req_{digest}", "custom_id": row.request.request_id,
          "response": {"status_code": 200, "request_id": f"req_{digest}", "body": body},
          "error": None}


def _chat_choice(row: StoredRow, completion: Completion, choice: Choice,
                 tokenizer: Tokenizer) -> dict[str, Any]:
  text = choice_text(choice, row.request.sampling_params.stop, _pieces(row, choice, tokenizer))
  return {"index": choice.index,
          "message": {"role": "assistant", "content": text},
          "finish_reason": choice.finish_reason,
          "logprobs": logprobs.chat(logprobs.of_choice(choice), tokenizer.token_name),
          **_ids(row, choice)}


def _completions_choice(row: StoredRow, completion: Completion, choice: Choice,
                        tokenizer: Tokenizer) -> dict[str, Any]:
  pieces, params = _pieces(row, choice, tokenizer), row.request.sampling_params
  text = choice_text(choice, params.stop, pieces)
  scores = logprobs.of_choice(choice)
  if row.echo and scores is not None:
    scores = logprobs.of_prompt(row.request, completion) + scores
  return {"index": choice.index,
          "text": text,
          "finish_reason": choice.finish_reason,
          "logprobs": logprobs.completions(scores, tokenizer.token_name, pieces, len(text),
                                           has_top=params.top_logprobs > 0),
          **_ids(row, choice)}


def _plain(row: StoredRow, completion: Completion, tokenizer: Tokenizer,
           job_id: str) -> dict[str, Any]:
  choices = []
  for choice in completion.choices:
    text = choice_text(choice, row.request.sampling_params.stop, _pieces(row, choice, tokenizer))
    fields = {"text": text, "finish_reason": choice.finish_reason, **_ids(row, choice)}
    if choice.logprobs is not None:
      fields["logprobs"] = logprobs.plain(logprobs.of_choice(choice), tokenizer.token_name)
    choices.append(fields)
  if len(choices) > 1:
    choices = [{"index": choice.index, **fields}
               for choice, fields in zip(completion.choices, choices)]
  prompt = logprobs.of_prompt(row.request, completion)
  prompt = {} if prompt is None else {
      "prompt_logprobs": logprobs.plain(prompt, tokenizer.token_name)}
  return {"id": row.request.request_id,
          **(choices[0] if len(choices) == 1 else {"choices": choices}),
          **prompt, "usage": _usage(completion)}


def _pieces(row: StoredRow, choice: Choice, tokenizer: Tokenizer) -> list[bytes]:
  echoed = row.request.prompt_token_ids.tolist() if row.echo else []
  return tokenizer.text_pieces(choice.token_ids.tolist(), echoed)


def _ids(row: StoredRow, choice: Choice) -> dict[str, Any]:
  return {"token_ids": choice.token_ids.tolist()} if row.return_token_ids else {}
