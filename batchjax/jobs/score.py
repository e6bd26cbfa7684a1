"""A file of prompts and continuations to a file of log-probabilities."""

from collections.abc import Collection

import numpy as np

from batchjax.config import JobConfig, ModelConfig
from batchjax.io import files, records
from batchjax.io.fields import InvalidField, reject, whole
from batchjax.io.records import Record, RowError
from batchjax.jobs.prepare import BadRow, guarded
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
  files.check_paths(input_path, {"output": output_path})
  model_config, tokenizer = loaders.read(config.model)
  requests: dict[str, ScoreRequest] = {}
  for record in records.read(input_path, config.limits.max_line_bytes):
    request = guarded(record, "", _parse, record, model_config, tokenizer, requests)
    if isinstance(request, RowError):
      raise BadRow(str(request))
    requests[request.request_id] = request
  configure_jax()
  scores = {s.request_id: s for s in score(
      loaders.load(config.model, model_config, config.engine.mesh), requests.values(), config.engine,
      module_class=loaders.module_class)}
  files.write_rows(files.Path(output_path), [
      {"id": name, "logprob": scores[name].total, "num_tokens": len(scores[name].logprobs),
       "is_greedy": bool(scores[name].is_greedy.all()),
       "token_logprobs": [float(x) for x in scores[name].logprobs]} for name in requests])
  return len(requests)


def _parse(record: Record, model: ModelConfig, tokenizer: Tokenizer,
           used: Collection[str]) -> ScoreRequest | RowError:
  """What a row asks; raises InvalidField where it is bad."""
  if isinstance(record.value, RowError):
    return record.value
  unknown = sorted(set(record.value) - {"id", "prompt", "continuation"})
  if unknown:
    raise InvalidField(unknown[0], f"{unknown[0]} is no field of a row to score, which has id, "
                       "prompt and continuation")
  for name in ("prompt", "continuation"):
    if not isinstance(record.value.get(name), str) or not record.value[name]:
      reject(name, "a string that is not empty", record.value.get(name))
  name = whole(record.value.get("id"))
  name = f"row-{record.row}" if name is None else name
  if type(name) not in (str, int):
    reject("id", "a string", name)
  if str(name) in used:
    raise InvalidField("id", f"id {name!r} is used by an earlier row: make it unique")
  prompt = tokenizer.encode(record.value["prompt"])
  tokens = tokenizer.encode(record.value["prompt"] + record.value["continuation"])
  if len(tokens) <= len(prompt):
    raise InvalidField("continuation", "continuation adds no token to the prompt: lengthen it")
  if len(tokens) > model.max_len:
    raise InvalidField("prompt", f"prompt and continuation have {len(tokens)} tokens, the model "
                       f"takes {model.max_len}: shorten them")
  tokens = np.array(tokens, np.int32)
  return ScoreRequest(str(name), tokens[:len(prompt)], tokens[len(prompt):])
