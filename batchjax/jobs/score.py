"""A file of prompts and continuations to a file of log-probabilities."""

import numpy as np

from batchjax.config import JobConfig, ModelConfig
from batchjax.io import files, records
from batchjax.io.records import Record, RowError
from batchjax.jobs.prepare import BadRow
from batchjax.jobs.run import Loaders, configure_jax
from batchjax.scoring import ScoreRequest, score
from batchjax.text.tokenizer import Tokenizer


def score_file(config: JobConfig, input_path: str, output_path: str,
               loaders: Loaders = Loaders()) -> int:
  """Scores every row; returns how many. The whole file is held in memory.

  Raises:
    BadRow: a row is bad; nothing was scored.
    InputError: a path cannot be read or written.
  """
  files.check_output(output_path)
  model_config, tokenizer = loaders.read(config.model)
  requests: dict[str, ScoreRequest] = {}
  for record in records.read(input_path):
    request = _parse(record, model_config, tokenizer)
    if request.request_id in requests:
      raise _bad(record, "id", f"id {request.request_id!r} is used by an earlier row: "
                 "make it unique")
    requests[request.request_id] = request
  configure_jax()
  scores = {s.request_id: s for s in score(
      loaders.load(config.model, model_config), requests.values(), config.engine,
      module_class=loaders.module_class)}
  files.write_rows(files.Path(output_path), [
      {"id": name, "logprob": scores[name].total, "num_tokens": len(scores[name].logprobs),
       "is_greedy": bool(scores[name].is_greedy.all()),
       "token_logprobs": [float(x) for x in scores[name].logprobs]} for name in requests])
  return len(requests)


def _parse(record: Record, model: ModelConfig, tokenizer: Tokenizer) -> ScoreRequest:
  if isinstance(record.value, RowError):
    raise BadRow(str(record.value))
  unknown = sorted(set(record.value) - {"id", "prompt", "continuation"})
  if unknown:
    raise _bad(record, unknown[0], f"{unknown[0]} is no field of a row to score, which has id, "
               "prompt and continuation")
  for name in ("prompt", "continuation"):
    if not isinstance(record.value.get(name), str) or not record.value[name]:
      raise _bad(record, name, f"{name} must be a string that is not empty, "
                 f"got {record.value.get(name)!r}")
  prompt = tokenizer.encode(record.value["prompt"])
  whole = tokenizer.encode(record.value["prompt"] + record.value["continuation"])
  if len(whole) <= len(prompt):
    raise _bad(record, "continuation", "continuation adds no token to the prompt: lengthen it")
  if len(whole) > model.max_len:
    raise _bad(record, "prompt", f"prompt and continuation have {len(whole)} tokens, the model "
               f"takes {model.max_len}: shorten them")
  name = record.value.get("id")
  if name is not None and type(name) not in (str, int):
    raise _bad(record, "id", f"id must be a string, got {name!r}")
  tokens = np.array(whole, np.int32)
  return ScoreRequest(f"row-{record.row}" if name is None else str(name), tokens[:len(prompt)],
                      tokens[len(prompt):])


def _bad(record: Record, field: str, message: str) -> BadRow:
  return BadRow(str(RowError(record.index, record.row, None, field, message, "invalid_value")))
