"""A whole job as the command line runs it: file in, file out, resumable."""

from collections.abc import Iterator
import contextlib
import dataclasses
import pathlib
import time
from typing import Any

from absl import logging
import jax
import numpy as np

from batchjax import report
from batchjax.config import JobConfig, ModelConfig
from batchjax.engine.device import chip_of, memory_limit
from batchjax.engine.sampling_inputs import SamplingFeatures
from batchjax.generation import generate
from batchjax.io import files, output, records
from batchjax.io.records import InputError, RowError
from batchjax.io.store import RequestReader, StoredRow
from batchjax.jobs import folder
from batchjax.jobs import job as job_lib
from batchjax.jobs import prepare
from batchjax.jobs.identity import identity
from batchjax.jobs.loaders import configure_jax, Loaders
from batchjax.jobs.recorder import Recorder
from batchjax.jobs.signals import Stop, stop_on_signal
from batchjax.plan import planner
from batchjax.plan.memory import num_kv_pages, settle
from batchjax.sharding import resolve
from batchjax.text.stop import build_stop_table
from batchjax.text.tokenizer import Tokenizer
from batchjax.types import Request, StopTable


def run(config: JobConfig, input_path: str, output_path: str, *, error_path: str | None = None,
        overwrite: bool = False, quiet: bool = False,
        loaders: Loaders = Loaders()) -> job_lib.Finished:
  """Completes every row of a file; the same call again resumes where it stopped.

  Beside the output lies `<output>.job`, with the manifest, the journal of
  finished rows, the tokenized requests, the plan and the metrics.

  Args:
    config: model, engine and defaults.
    input_path: `.jsonl`, `.jsonl.gz` or `.parquet`.
    output_path: likewise; written once all rows are done.
    error_path: rows that were bad; `default_error_path` when None.
    overwrite: move the folder of an earlier job aside and start anew.
    quiet: show no progress.
    loaders: how the model is loaded.

  Raises:
    Interrupted: SIGINT or SIGTERM came; the step that ran then is finished and kept.
    InputError, ConfigError, BadRow, JobError: see there; no model was loaded.
  """
  error_path = error_path or default_error_path(output_path)
  directory = pathlib.Path(f"{output_path}.job")
  _check_paths(input_path, output_path, error_path, directory)
  with stop_on_signal() as stop:
    model_config, tokenizer = loaders.read(config.model)
    device = configure_jax()
    engine = dataclasses.replace(config.engine, mesh=resolve(config.engine.mesh))
    config = dataclasses.replace(config, engine=settle(
        model_config, engine, chip_of(device), memory_limit(device)))
    with job_lib.open_job(directory, identity(config, input_path), overwrite=overwrite) as job:
      prepared, requests = _prepare_once(job, input_path, config, model_config, tokenizer)
      with requests:
        done = job.begin(prepared.num_rows)
        for error in prepared.errors:
          if not done[error.index]:
            job.append_error(error.index, output.format_error(error, job_id=job.id))
        left = np.flatnonzero(~done[requests.indices])
        if len(left):
          _complete(job, requests, left, prepared, config, model_config, tokenizer, quiet, loaders,
                    stop)
      return job.finish(output_path, error_path)


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
  for path in (input_path, error_path):
    if directory.resolve() in pathlib.Path(path).resolve().parents:
      raise InputError(f"{path} lies in the job's own folder: name a file elsewhere")


def _prepare_once(job: job_lib.Job, input_path: str, config: JobConfig, model: ModelConfig,
                  tokenizer: Tokenizer) -> tuple[prepare.Prepared, RequestReader]:
  """Validated and tokenized rows; those of an earlier run of the job are used again if undamaged."""
  done_path, store_path = job.directory / folder.PREPARED, job.directory / folder.REQUESTS
  if done_path.exists():
    try:
      values = files.read_sealed(done_path, "job", "sha256", "num_rows", "errors")
      if values["job"] != job.id:
        raise files.DamagedFile(f"{done_path} is another job's")
      return (prepare.Prepared(values["num_rows"], tuple(RowError(**e) for e in values["errors"])),
              RequestReader(store_path, values["sha256"]))
    except (files.DamagedFile, TypeError) as e:  # TypeError: of another version
      logging.warning("%s: the input is tokenized again", e)
  try:
    prepared = prepare.prepare(input_path, store_path, config, model, tokenizer)
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
  return build_stop_table(stops, [tokenizer.token_bytes(i) for i in range(model.vocab_size)],
                          max_bytes)


def _complete(job: job_lib.Job, requests: RequestReader, left: np.ndarray,
              prepared: prepare.Prepared, config: JobConfig, model_config: ModelConfig,
              tokenizer: Tokenizer, quiet: bool, loaders: Loaders, stop: Stop) -> None:
  """Runs the requests at positions `left` and journals each as it is done."""
  engine = config.engine
  stop_table = _stop_table(requests, model_config, tokenizer, config.limits.max_stop_table_bytes)
  device = jax.devices()[0]
  model = loaders.load(config.model, model_config, engine.mesh)
  features = SamplingFeatures.of((r.sampling_params for r in requests),
                                 model.config.eos_token_ids)
  num_errors = len(prepared.errors)
  run_record = report.RunRecord(
      time=time.time(), device_kind=device.device_kind, num_devices=engine.mesh.tensor,
      model=config.model.name or pathlib.Path(config.model.path).name or config.model.shape,
      jax_version=jax.__version__, num_requests=len(left) + num_errors,
      num_prompt_tokens=int(requests.prompt_lens[left].sum()),
      num_pages=num_kv_pages(model.config, engine), page_size=engine.page_size,
      max_rows=engine.max_rows)
  pending: dict[str, tuple[StoredRow, int]] = {}
  with contextlib.ExitStack() as stack:
    progress = stack.enter_context(report.Progress(run_record, quiet=quiet))
    metrics = stack.enter_context(report.MetricsWriter(job.directory / report.METRICS_FILE))
    metrics.write(run_record)
    recorder = Recorder(job.directory, metrics, progress, num_errors, stop)
    completions = generate(model, _pending(requests, left, engine, pending), engine,
                           features=features, stop_table=stop_table, observe=recorder.observe,
                           module_class=loaders.module_class)
    for completion in completions:
      row, num_cached = pending.pop(completion.request_id)
      # As planned over the whole file, so that a resumed job writes the same bytes.
      completion = dataclasses.replace(completion, num_cached_tokens=num_cached)
      if error := output.completion_error(row, completion):
        job.append_error(row.index, output.format_error(error, job_id=job.id))
      else:
        job.append(row.index, output.format_completion(
            row, completion, tokenizer=tokenizer, job_id=job.id))
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
