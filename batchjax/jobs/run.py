"""A whole job as the command line runs it: file in, file out, resumable."""

import collections
from collections.abc import Iterator
import dataclasses
import itertools
import pathlib
import time
from typing import Any

from absl import logging
import jax
import numpy as np

from batchjax import hub, report
from batchjax.config import ConfigError, JobConfig, ModelConfig
from batchjax.engine.device import chip_of, memory_limit
from batchjax.engine.sampling_inputs import SamplingFeatures
from batchjax.generation import generate
from batchjax.io import files, output, paths, records
from batchjax.io.carried import Carried
from batchjax.io.paths import InputError
from batchjax.io.records import RowError
from batchjax.io.store import RequestReader, StoredRow
from batchjax.jobs import folder
from batchjax.jobs import job as job_lib
from batchjax.jobs import prepare
from batchjax.jobs.identity import identity
from batchjax.jobs.loaders import configure_jax, Loaders
from batchjax.jobs.recorder import READING, Recorder
from batchjax.jobs.signals import Stop, stop_on_signal
from batchjax.plan import planner
from batchjax.plan.memory import num_kv_pages, settle
from batchjax.sharding import resolve
from batchjax.text.tokenizer import Tokenizer
from batchjax.types import Completion, Request, StopTable


def run(config: JobConfig, input_path: str, output_path: str, *, error_path: str | None = None,
        job_dir: str = "", limit: int | None = None, overwrite: bool = False, quiet: bool = False,
        scores: bool = False,
        loaders: Loaders = Loaders()) -> job_lib.Finished:
  """Completes or scores every row of a file; the same call again resumes where it stopped.

  Beside the output lies `<output>.job`, with the manifest, the journal of
  finished rows, the tokenized requests, the plan and the metrics.

  Args:
    config: model, engine and defaults.
    input_path: `.jsonl`, `.jsonl.gz` or `.parquet`.
    output_path: likewise; written once all rows are done. It may be in a store: gs://bucket/x.jsonl.
    error_path: rows that were bad; `default_error_path` when None.
    job_dir: folder of this machine in place of `<output>.job`; see `folder.directory_of`.
    limit: only the first so many rows of the input; None completes all. Part of what makes a job
      the same job.
    overwrite: move the folder of an earlier job aside and start anew.
    quiet: show no progress.
    scores: rows hold continuations, whose log-probabilities are the output (`io.scores`).
    loaders: how the model is loaded.

  Raises:
    Interrupted: SIGINT or SIGTERM came; the step that ran then is finished and kept.
    InputError, ConfigError, BadRow, JobError: see there; no model was loaded.

  >>> rows = pathlib.Path("requests.jsonl")
  >>> _ = rows.write_text('{"id": "a", "prompt": "The end", "max_tokens": 4, "temperature": 0}')
  >>> config = batchjax.JobConfig(batchjax.ModelSource(path=path))
  >>> batchjax.run(config, "requests.jsonl", "completions.jsonl", quiet=True).num_outputs
  1
  >>> "text" in json.loads(pathlib.Path("completions.jsonl").read_text())
  True
  """
  if limit is not None and limit < 1:
    raise ConfigError(f"limit={limit} must be at least 1, or None for all rows")
  error_path = error_path or default_error_path(output_path)
  directory = folder.directory_of(output_path, job_dir)
  if paths.is_remote(output_path):
    logging.info("the job keeps its state in %s", directory)
  _check_paths(input_path, output_path, error_path, directory)
  with stop_on_signal() as stop, report.Progress(quiet=quiet) as progress:
    progress.phase(READING[0])
    asked = config.model
    config = dataclasses.replace(config, model=hub.pin(
        asked, None if overwrite else job_lib.read_pins(directory)))
    model_config, tokenizer = loaders.read(config.model)
    device = configure_jax()
    engine = dataclasses.replace(config.engine, mesh=resolve(config.engine.mesh))
    config = dataclasses.replace(config, engine=settle(
        model_config, engine, chip_of(device), memory_limit(device)))
    job_identity = identity(config, input_path, limit) | ({"task": "score"} if scores else {})
    with job_lib.open_job(directory, job_identity, overwrite=overwrite,
                          pins=hub.pins(asked, config.model)) as job:
      progress.phase(READING[1])
      prepared, requests = _prepare_once(job, input_path, config, model_config, tokenizer, limit, scores,
                                         progress)
      if prepared.carried:
        logging.info("carried through to the output: %s", ", ".join(prepared.carried[:20]))
      with requests:
        done = job.begin(prepared.num_rows).copy()
        errors = [error for error in prepared.errors if not done[error.index]]
        for error in errors:
          job.append_error(error.index, output.format_error(error, job_id=job.id))
        left = np.flatnonzero(~done[requests.indices])
        if len(left):
          _complete(job, requests, left, errors, config, model_config, tokenizer, progress, loaders,
                    stop, num_done=len(requests) - len(left) + len(prepared.errors) - len(errors))
      finished = job.finish(output_path, error_path, Carried(
          input_path, prepared.carried, config.limits.max_line_bytes, limit, "score" if scores else "plain"))
      return dataclasses.replace(finished, unit="scores") if scores else finished


def default_error_path(output_path: str) -> str:
  """`out.jsonl` has its bad rows in `out.errors.jsonl`, `out.parquet` in `out.errors.parquet`."""
  suffix = records.file_format(output_path)
  return f"{output_path.removesuffix(suffix)}.errors{suffix}"


def _check_paths(input_path: str, output_path: str, error_path: str,
                 directory: pathlib.Path) -> None:
  """Raises InputError where the input cannot be read or an output not be written."""
  files.check_paths(input_path, {"output": output_path, "errors": error_path})
  if pathlib.Path(f"{error_path}.job").exists():
    raise InputError(f"{error_path} is the output of another job: name another file for the errors")
  for path in (input_path, output_path, error_path):
    if not paths.is_remote(path) and directory.resolve() in pathlib.Path(path).resolve().parents:
      raise InputError(f"{path} lies in the job's own folder: name a file elsewhere")


def _prepare_once(job: job_lib.Job, input_path: str, config: JobConfig, model: ModelConfig,
                  tokenizer: Tokenizer, limit: int | None, scores: bool, progress: report.Progress
                  ) -> tuple[prepare.Prepared, RequestReader]:
  """Validated and tokenized rows; those of an earlier run of the job are used again if undamaged."""
  done_path, store_path = job.directory / folder.PREPARED, job.directory / folder.REQUESTS
  if done_path.exists():
    try:
      values = files.read_sealed(done_path, "job", "sha256", "num_rows", "errors", "carried")
      if values["job"] != job.id:
        raise files.DamagedFile(f"{done_path} is another job's")
      return (prepare.Prepared(values["num_rows"], tuple(RowError(**e) for e in values["errors"]),
                               tuple(values["carried"])),
              RequestReader(store_path, values["sha256"]))
    except (files.DamagedFile, TypeError) as e:  # TypeError: of another version
      logging.warning("%s: the input is tokenized again", e)
  try:
    prepared = prepare.prepare(input_path, store_path, config, model, tokenizer, limit, scores,
                               progress.advance)
    sha256 = job_lib.hash_file(store_path)
    files.write_sealed(done_path, {"job": job.id, "sha256": sha256} | dataclasses.asdict(prepared))
  except BaseException:
    job.discard_if_empty()
    raise
  return prepared, RequestReader(store_path)


def _stop_table(requests: RequestReader, model: ModelConfig, tokenizer: Tokenizer,
                max_bytes: int) -> StopTable | None:
  """Automata of all stop strings, None where there are none; `prepare` saw to it that they fit."""
  stops = prepare.stop_strings(requests)
  if not stops:
    return None
  return tokenizer.stop_table(stops, model.vocab_size, max_bytes)


def _complete(job: job_lib.Job, requests: RequestReader, left: np.ndarray,
              errors: list[RowError], config: JobConfig, model_config: ModelConfig,
              tokenizer: Tokenizer, progress: report.Progress, loaders: Loaders, stop: Stop,
              num_done: int) -> None:
  """Runs the requests at positions `left` and journals each as it is done."""
  engine = config.engine
  model = loaders.begin(config.model, model_config, engine.mesh)
  stop_table = _stop_table(requests, model_config, tokenizer, config.limits.max_stop_table_bytes)
  device = jax.devices()[0]
  features = SamplingFeatures.of((r.sampling_params for r in requests),
                                 model.config.eos_token_ids)
  run_record = report.RunRecord(
      time=time.time() - progress.secs, device_kind=device.device_kind, num_devices=engine.mesh.tensor,
      model=config.model.name or hub.title(config.model.path) or config.model.shape,
      jax_version=jax.__version__, num_requests=len(left) + len(errors),
      num_prompt_tokens=int(requests.prompt_lens[left].sum()),
      num_pages=num_kv_pages(model.config, engine), page_size=engine.page_size,
      max_rows=engine.max_rows, num_done=num_done)
  pending: dict[str, tuple[StoredRow, int]] = {}
  answers: dict[int, list[tuple[StoredRow, Completion]]] = collections.defaultdict(list)
  num_requests = np.bincount(requests.indices)  # of each row

  def text_of(index: int, start: int, length: int) -> str:
    row, _ = next(itertools.islice(pending.values(), index, None))  # a window begins with none left
    return tokenizer.decode(row.request.prompt_token_ids[start:start + length].tolist())

  with report.MetricsWriter(job.directory / report.METRICS_FILE) as metrics:
    metrics.write(run_record)
    recorder = Recorder(job.directory, run_record, metrics, progress, errors, text_of, stop)
    completions = generate(model, _pending(requests, left, engine, pending), engine,
                           features=features, stop_table=stop_table, observe=recorder.observe,
                           module_class=loaders.module_class)
    for completion in completions:
      row, num_cached = pending.pop(completion.request_id)
      # As planned over the whole file, so that a resumed job writes the same bytes.
      completion = dataclasses.replace(completion, num_cached_tokens=num_cached)
      answers[row.index].append((row, completion))
      if len(answers[row.index]) == num_requests[row.index]:
        whole = answers.pop(row.index)
        errors = (output.completion_error(*answer) for answer in whole)
        if error := next(filter(None, errors), None):
          job.append_error(row.index, output.format_error(error, job_id=job.id))
        else:
          job.append(row.index, output.format_answer(whole, tokenizer=tokenizer, job_id=job.id))
      recorder.finish(row, completion)


def _pending(requests: RequestReader, left: np.ndarray, engine: Any,
             pending: dict[str, tuple[StoredRow, int]]) -> Iterator[Request]:
  """Requests still to do, read a window at a time; each is put into `pending` on its way out."""
  is_left = np.zeros(len(requests), bool)
  is_left[left] = True
  for window in requests.windows(engine.plan_window):
    if not is_left[window].any():
      continue
    rows = requests.take(window)
    cached = planner.cached_tokens([row.request for row in rows], engine)
    for i in np.flatnonzero(is_left[window]):
      pending[rows[i].request.request_id] = rows[i], int(cached[i])
      yield rows[i].request
