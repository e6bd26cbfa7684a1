"""A whole job as the command line runs it: file in, file out, resumable."""

import contextlib
import dataclasses
import json
import os
import pathlib
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from batchjax import job as job_lib
from batchjax import prepare, report, weights
from batchjax.config import ConfigError, JobConfig, ModelConfig, ModelSource
from batchjax.device import chip_of, memory_limit
from batchjax.engine.compile import CompileRecord
from batchjax.engine.sampling_inputs import SamplingFeatures
from batchjax.generate import StepEvent, generate
from batchjax.io import files, output, records
from batchjax.io.records import InputError, RowError
from batchjax.io.store import RequestReader, StoredRow
from batchjax.models import Transformer
from batchjax.plan import planner
from batchjax.plan.memory import DEVICE_SHARE, num_kv_pages, settle
from batchjax.plan.planner import Plan
from batchjax.plan.summary import plan_summary
from batchjax.text.stop import build_stop_table
from batchjax.text.tokenizer import Tokenizer, load_tokenizer
from batchjax.types import Completion, Request, StopTable


class Interrupted(KeyboardInterrupt):
  """The job was asked to stop; what is done is in its journal."""


def read_tokenizer(source: ModelSource) -> Tokenizer:
  """The tokenizer at `source.tokenizer`, or beside the weights.

  Raises:
    ConfigError: none is named, or it is of no known kind.
  """
  path = source.tokenizer or source.path
  if not path:
    raise ConfigError("model.tokenizer is empty, and random weights have none beside them: name "
                      "a folder, a tokenizer.json, a .model or a .gguf file")
  try:
    return load_tokenizer(pathlib.Path(path).expanduser())
  except ValueError as e:
    raise ConfigError(f"{'model.tokenizer' if source.tokenizer else 'model.path'}: {e}") from e


@dataclasses.dataclass(frozen=True)
class Loaders:
  """How the parts of a model are loaded; tests put a fake model here."""

  config: Callable[[ModelSource], ModelConfig] = weights.load_config
  tokenizer: Callable[[ModelSource], Tokenizer] = read_tokenizer
  model: Callable[[ModelSource], weights.Model] = weights.load_model
  module_class: Callable[..., Any] = Transformer


def run(config: JobConfig, input_path: str, output_path: str, *, error_path: str | None = None,
        quiet: bool = False, loaders: Loaders = Loaders()) -> job_lib.Finished:
  """Completes every row of a file; the same call again resumes where it stopped.

  Beside the output lies `<output>.job`, with the manifest, the journal of
  finished rows, the tokenized requests, the plan and the metrics.

  Args:
    config: model, engine and defaults.
    input_path: `.jsonl`, `.jsonl.gz` or `.parquet`.
    output_path: likewise; written once all rows are done.
    error_path: rows that were bad; `<output stem>.errors.jsonl` when None.
    quiet: show no progress.
    loaders: how the model is loaded.

  Raises:
    Interrupted: SIGINT or SIGTERM came; the step that ran then is finished and kept.
    InputError, ConfigError, BadRow, JobError: see there; no model was loaded.
  """
  error_path = error_path or default_error_path(output_path)
  _check_paths(input_path, output_path, error_path)
  with _stop_on_signal() as stop:
    model_config, tokenizer = loaders.config(config.model), loaders.tokenizer(config.model)
    configure_jax(config.engine.compilation_cache_dir)
    device = jax.devices()[0]
    config = dataclasses.replace(config, engine=settle(
        model_config, config.engine, chip_of(device), memory_limit(device)))
    with job_lib.open_job(f"{output_path}.job", identity(config, input_path)) as job:
      prepared = _prepare_once(job, input_path, config, model_config, tokenizer)
      with RequestReader(job.directory / "requests.arrow") as requests:
        done = job.finished_rows(prepared.num_rows)
        for error in prepared.errors:
          if not done[error.index]:
            job.append_error(error.index, output.format_error(error, job_id=job.id))
        left = np.flatnonzero(~done[requests.indices])
        if len(left):
          _complete(job, requests, left, prepared, config, model_config, tokenizer, quiet, loaders,
                    stop)
      return job.finish(output_path, error_path, prepared.num_rows)


def default_error_path(output_path: str) -> str:
  """`out.jsonl` has its bad rows in `out.errors.jsonl`."""
  return output_path.removesuffix(records.file_format(output_path)) + ".errors.jsonl"


def _check_paths(input_path: str, output_path: str, error_path: str) -> None:
  """Raises InputError where the input cannot be read or an output not be written."""
  for path in (output_path, error_path):
    files.check_output(path)
  next(records.read(input_path))
  paths = {"input": input_path, "output": output_path, "errors": error_path}
  if len({str(pathlib.Path(path).resolve()) for path in paths.values()}) < len(paths):
    raise InputError(f"{paths} name one file twice: give each its own")


def identity(config: JobConfig, input_path: str) -> dict[str, Any]:
  """All that the output depends on; most engine settings change speed only and are left out."""
  source = config.model
  model = {"name": source.name, "dtype": source.dtype, "shape": source.shape, "seed": source.seed,
           "files": _hash_files(source.path)}
  # What `planner.cached_tokens` depends on, which the usage of each completion shows.
  engine = {name: getattr(config.engine, name)
            for name in ("share_prefixes", "max_levels", "plan_window")}
  settings = {"sampling": dataclasses.asdict(config.sampling), "seed": config.seed,
              "strict": config.strict, "engine": engine,
              "chat_template": _hash_files(config.chat_template)}
  return {"input": job_lib.hash_file(input_path), "model": model,
          "tokenizer": _hash_files(source.tokenizer), "settings": settings}


def _hash_files(path: str) -> dict[str, str]:
  """SHA-256 of a file, or of every file in a folder."""
  if not path:
    return {}
  root = pathlib.Path(path).expanduser()
  paths = [root] if root.is_file() else sorted(p for p in root.rglob("*") if p.is_file())
  return {str(p.relative_to(root.parent)): job_lib.hash_file(p) for p in paths}


def _prepare_once(job: job_lib.Job, input_path: str, config: JobConfig, model: ModelConfig,
                  tokenizer: Tokenizer) -> prepare.Prepared:
  """Validated and tokenized rows; those of an earlier run of the job are used again."""
  done_path = job.directory / "prepared.json"
  if done_path.exists():
    values = json.loads(done_path.read_text("utf-8"))
    return prepare.Prepared(values["num_rows"], tuple(RowError(**e) for e in values["errors"]))
  try:
    prepared = prepare.prepare(input_path, job.directory / "requests.arrow", config, model,
                               tokenizer)
  except (ConfigError, InputError, OSError, prepare.BadRow):
    _forget(job.directory)
    raise
  with files.atomic(done_path) as f:
    f.write(json.dumps(dataclasses.asdict(prepared)).encode())
  return prepared


def _forget(directory: pathlib.Path) -> None:
  """Removes a job in which nothing was done, so that its input and settings may be corrected."""
  for name in ("manifest.json", "journal.jsonl", "lock"):
    (directory / name).unlink(missing_ok=True)
  with contextlib.suppress(OSError):  # something else lies in it
    directory.rmdir()


def _stop_table(requests: RequestReader, model: ModelConfig,
                tokenizer: Tokenizer) -> StopTable | None:
  """Automata of all stop strings, None where there are none; raises ConfigError if too large."""
  stops = prepare.stop_strings(requests)
  if not stops:
    return None
  try:
    return build_stop_table(stops, [tokenizer.token_bytes(i) for i in range(model.vocab_size)])
  except ValueError as e:
    raise ConfigError(f"stop: {e}") from e


def _complete(job: job_lib.Job, requests: RequestReader, left: np.ndarray,
              prepared: prepare.Prepared, config: JobConfig, model_config: ModelConfig,
              tokenizer: Tokenizer, quiet: bool, loaders: Loaders, stop: "_Stop") -> None:
  """Runs the requests at positions `left` and journals each as it is done."""
  engine = config.engine
  stop_table = _stop_table(requests, model_config, tokenizer)
  device = jax.devices()[0]
  model = loaders.model(config.model)
  features = SamplingFeatures.of((r.sampling_params for r in requests),
                                 model.config.eos_token_ids)
  num_errors = len(prepared.errors)
  run_record = report.RunRecord(
      time=time.time(), device_kind=device.device_kind, num_devices=1,
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
    recorder = _Recorder(job.directory, metrics, progress, num_errors, stop)
    completions = generate(model, _pending(requests, left, engine, pending), engine,
                           features=features, stop_table=stop_table, observe=recorder.observe,
                           module_class=loaders.module_class)
    for completion in completions:
      row, num_cached = pending.pop(completion.request_id)
      # As planned over the whole file, so that a resumed job writes the same bytes.
      completion = dataclasses.replace(completion, num_cached_tokens=num_cached)
      job.append(row.index, output.format_completion(
          row, completion, decode_fn=tokenizer.decode, token_bytes_fn=tokenizer.token_bytes,
          job_id=job.id))
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


class _Recorder:
  """Turns what `generate` shows of itself into metrics and progress."""

  def __init__(self, directory: pathlib.Path, metrics: report.MetricsWriter,
               progress: report.Progress, num_errors: int, stop: "_Stop"):
    self._directory, self._sinks = directory, (metrics.write, progress.update)
    self._num_errors, self._stop = num_errors, stop
    self._is_last_step = False
    self._start = time.perf_counter()
    self._started: dict[str, float] = {}

  def _emit(self, record: report.Record) -> None:
    for sink in self._sinks:
      sink(record)

  def observe(self, event: Plan | CompileRecord | StepEvent) -> None:
    """Raises Interrupted once the results of the first step after a stop signal are kept."""
    now = time.perf_counter() - self._start
    if isinstance(event, Plan):
      self._stop.is_deferred = True  # steps begin
      with files.atomic(self._directory / report.PLAN_FILE) as f:
        f.write(json.dumps(plan_summary(event), indent=1).encode())
    elif isinstance(event, CompileRecord):
      self._emit(report.CompileRecord(bucket=event.name, secs=event.secs, cached=event.cached))
    else:
      if self._is_last_step:
        raise Interrupted
      # Completions of a step are handed out only after it was observed.
      self._is_last_step = self._stop.is_requested
      for admission in event.batch.admissions:
        self._started.setdefault(admission.request_id, now - event.step_secs)
      batch, steps = event.batch, event.batch.num_steps
      self._emit(report.StepRecord(
          secs=now, kind=batch.kind, step_secs=event.step_secs, host_secs=event.host_secs,
          num_steps=steps,
          num_tokens=event.generated_tokens if batch.kind == "decode" else batch.num_tokens,
          bucket_tokens=event.bucket.num_tokens * steps, num_rows=event.stats.num_running,
          bucket_rows=event.bucket.num_rows, prompt_tokens=batch.num_prompt_tokens,
          generated_tokens=event.generated_tokens, used_pages=event.stats.used_pages,
          waiting=event.stats.num_waiting,
          finished=event.stats.num_retired + self._num_errors,
          preempted=event.stats.num_preempted))

  def finish(self, row: StoredRow, completion: Completion) -> None:
    """Records a finished request."""
    reasons = {choice.finish_reason for choice in completion.choices}
    self._emit(report.RequestRecord(
        request_id=completion.request_id, row=row.index,
        prompt_tokens=completion.num_prompt_tokens, cached_tokens=completion.num_cached_tokens,
        generated_tokens=sum(len(choice.token_ids) for choice in completion.choices),
        start_secs=self._started.pop(completion.request_id),
        end_secs=time.perf_counter() - self._start,
        finish_reason="length" if "length" in reasons else "stop"))


@dataclasses.dataclass
class _Stop:
  """Whether a signal asked to stop, and whether it waits for the end of a step."""

  is_requested: bool = False
  is_deferred: bool = False


@contextlib.contextmanager
def _stop_on_signal() -> Iterator[_Stop]:
  """Lets SIGINT and SIGTERM raise Interrupted, or note the request while it is deferred.

  A second one acts as it would without this.
  """
  stop = _Stop()
  previous = {}

  def note(number, frame):
    signal.signal(number, previous[number])
    stop.is_requested = True
    if not stop.is_deferred:
      raise Interrupted

  for number in (signal.SIGINT, signal.SIGTERM):
    previous[number] = signal.signal(number, note)
  try:
    yield stop
  finally:
    for number, handler in previous.items():
      signal.signal(number, handler)


def configure_jax(cache_dir: str) -> None:
  """Gives JAX most of the device's memory, and a folder to keep compiled steps in ("": none).

  To be called before the first use of a device.
  """
  os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", str(DEVICE_SHARE))
  if cache_dir:
    path = pathlib.Path(cache_dir).expanduser()
    path.mkdir(parents=True, exist_ok=True)
    jax.config.update("jax_compilation_cache_dir", str(path))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
