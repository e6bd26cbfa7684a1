"""The columns of Arrow and Parquet files."""

import pyarrow as pa

_TEXT, _INT, _FLOAT, _TOKENS = pa.string(), pa.int64(), pa.float64(), pa.list_(pa.int32())
_USAGE = pa.struct({
    "prompt_tokens": _INT, "completion_tokens": _INT, "total_tokens": _INT,
    "prompt_tokens_details": pa.struct({"cached_tokens": _INT})})
_ERROR = pa.struct({"code": _TEXT, "message": _TEXT, "param": _TEXT, "row": _INT})

_CHAT_TOKEN = {"token": _TEXT, "logprob": _FLOAT, "bytes": pa.list_(pa.int32())}
_BATCH_LOGPROBS = pa.struct({
    "content": pa.list_(pa.struct(
        _CHAT_TOKEN | {"top_logprobs": pa.list_(pa.struct(_CHAT_TOKEN))})),
    "tokens": pa.list_(_TEXT), "token_logprobs": pa.list_(_FLOAT),
    "top_logprobs": pa.list_(pa.map_(_TEXT, _FLOAT)), "text_offset": pa.list_(_INT)})
_BATCH_CHOICE = pa.struct({
    "index": _INT, "text": _TEXT, "message": pa.struct({"role": _TEXT, "content": _TEXT}),
    "finish_reason": _TEXT, "logprobs": _BATCH_LOGPROBS, "token_ids": _TOKENS})
_BODY = pa.struct({
    "id": _TEXT, "object": _TEXT, "created": _INT, "model": _TEXT,
    "choices": pa.list_(_BATCH_CHOICE), "usage": _USAGE, "metadata": _TEXT, "error": _ERROR})

_PLAIN_TOKEN = {"token_id": pa.int32(), "token": _TEXT, "logprob": _FLOAT}
_PLAIN_LOGPROBS = pa.list_(pa.struct(
    _PLAIN_TOKEN | {"top_logprobs": pa.list_(pa.struct(_PLAIN_TOKEN))}))
_PLAIN_CHOICE = {"text": _TEXT, "finish_reason": _TEXT, "token_ids": _TOKENS,
                 "logprobs": _PLAIN_LOGPROBS}

_SCORE = {"logprob": _FLOAT, "num_tokens": _INT, "is_greedy": pa.bool_(), "token_ids": _TOKENS,
          "token_logprobs": pa.list_(_FLOAT)}

_OUTPUT_COLUMNS = {
    "plain": {
        "id": _TEXT, **_PLAIN_CHOICE,
        "choices": pa.list_(pa.struct({"index": _INT} | _PLAIN_CHOICE)),
        "prompt_logprobs": _PLAIN_LOGPROBS, "usage": _USAGE},
    "batch": {
        "id": _TEXT, "custom_id": _TEXT,
        "response": pa.struct({"status_code": _INT, "request_id": _TEXT, "body": _BODY}),
        "error": _ERROR},
    "score": {
        "id": _TEXT, **_SCORE, "perplexity": _FLOAT,
        "choices": pa.list_(pa.struct({"index": _INT} | _SCORE))},
}

# The fields that output and error rows have of their own.
OUTPUT_NAMES = {form: frozenset(_OUTPUT_COLUMNS[form]) | frozenset(_OUTPUT_COLUMNS["batch"])
                for form in ("plain", "score")}

REQUEST_SCHEMA = pa.schema({
    "index": pa.int64(), "row": pa.int64(), "request_id": _TEXT, "sampling_params": _TEXT, "seed": pa.uint32(),
    "form": _TEXT, "model": _TEXT, "echo": pa.bool_(), "return_token_ids": pa.bool_(),
    "token_ids": _TOKENS})


def output_schema(forms: set[str]) -> pa.Schema:
  """The columns of an output file that holds rows of these forms ("plain", "batch", "score")."""
  columns = {}
  for form in sorted(forms):
    columns |= _OUTPUT_COLUMNS[form]
  return pa.schema(columns)
