"""The scripts as a user runs them: flags in, files, text and an exit status out."""

import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import pytest

ROOT = pathlib.Path(__file__).parents[2]
ROWS = [
    {"id": "a", "prompt": "What is the time?", "ignore_eos": True},
    {"custom_id": "b", "method": "POST", "url": "/v1/chat/completions",
     "body": {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4}},
    {"id": "c", "prompt": "What is the time?", "max_tokens": "many"},
    {"id": "d", "prompt": "What is the day?"},
]


def write_rows(path, rows):
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def read_rows(path):
  return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def done(tmp_path_factory, script, tiny_config):
  """A folder with a finished job, the flags that made it and what it printed."""
  folder = tmp_path_factory.mktemp("done")
  write_rows(folder / "in.jsonl", ROWS)
  flags = [f"--config={tiny_config}", f"--input={folder / 'in.jsonl'}",
           f"--output={folder / 'out.jsonl'}"]
  return folder, flags, script("run", *flags)


def test_run_writes_completions_errors_and_a_report(done):
  folder, _, process = done
  assert process.returncode == 3, process.stderr  # with an error row
  rows = read_rows(folder / "out.jsonl")
  assert [row.get("custom_id") or row["id"] for row in rows] == ["a", "b", "d"]
  assert rows[0]["usage"]["completion_tokens"] == 8  # the configuration's default
  error, = read_rows(folder / "out.errors.jsonl")
  assert error["custom_id"] == "c" and error["error"]["param"] == "max_tokens"
  assert f"3 completions, 1 errors -> {folder / 'out.jsonl'}" in process.stdout
  assert str(folder / "out.errors.jsonl") in process.stdout
  assert "compile" in process.stdout  # the closing report


def test_progress_off_a_terminal_is_plain_lines_on_standard_error(done):
  lines = [line.split("  ", 1)[1] for line in done[2].stderr.splitlines()
           if re.match(r"\d:\d\d:\d\d  ", line)]
  assert lines[:3] == ["loading the tokenizer", "reading rows", "planning"]
  assert lines.index("loading the model") > 3, "what is left to wait for when all steps are compiled"
  assert lines[-1].startswith("4/4 requests; done in 0:")
  assert "Traceback" not in done[2].stderr


def test_the_same_command_again_has_nothing_to_do(done, script):
  folder, flags, _ = done
  before = {path: path.stat().st_mtime_ns for path in folder.glob("out*") if path.is_file()}
  process = script("run", *flags)
  assert process.returncode == 3, process.stderr
  assert "already finished: 3 completions, 1 errors; nothing to do" in process.stdout
  assert {path: path.stat().st_mtime_ns for path in before} == before


def test_changed_settings_are_refused_and_shown(done, script):
  process = script("run", *done[1], "--config.sampling.max_tokens=5", "--config.seed=3")
  assert process.returncode == 2
  assert "settings.sampling.max_tokens: 8 -> 5" in process.stderr
  assert "settings.seed: 0 -> 3" in process.stderr
  assert "Traceback" not in process.stderr


def test_report_writes_a_page(done, script):
  page = done[0] / "report.html"
  process = script("report", f"--job={done[0] / 'out.jsonl.job'}", f"--html={page}")
  assert process.returncode == 0, process.stderr
  assert str(page) in process.stdout
  html = page.read_text()
  assert html.lstrip().startswith("<!") and "<svg" in html and "http-equiv=\"refresh" not in html


def test_overrides_and_quiet(tmp_path, script, tiny_config, done):
  write_rows(tmp_path / "in.jsonl", ROWS)
  process = script("run", f"--config={tiny_config}", f"--input={tmp_path / 'in.jsonl'}",
                   f"--output={tmp_path / 'out.jsonl'}", f"--errors={tmp_path / 'bad.jsonl'}",
                   "--quiet", "--config.engine.max_rows=4", "--config.engine.page_size=4")
  assert process.returncode == 3, process.stderr
  assert process.stdout == process.stderr == "", "quiet is quiet"
  run_record = read_rows(tmp_path / "out.jsonl.job/metrics.jsonl")[0]
  assert (run_record["max_rows"], run_record["page_size"]) == (4, 4)
  # Engine settings change the speed, not the job.
  assert (tmp_path / "out.jsonl").read_bytes() == (done[0] / "out.jsonl").read_bytes()
  assert (tmp_path / "bad.jsonl").exists() and not (tmp_path / "out.errors.jsonl").exists()


@pytest.mark.parametrize("flag, message", [
    ("--config.engine.max_row=4", "did you mean --config.engine.max_rows or"),
    ("--config.engine.max_rows=0", "engine.max_rows must be positive, got 0"),
    ("--config.model.path=/nowhere", "model.path='/nowhere' is neither a .gguf file nor a folder"),
    ("--strict", "row 3 (c): max_tokens must be an integer"),
    ("--input=none.jsonl", "none.jsonl does not exist: check the path"),
])
def test_bad_flags_say_what_is_wrong(tmp_path, script, tiny_config, flag, message):
  write_rows(tmp_path / "in.jsonl", ROWS)
  process = script("run", f"--config={tiny_config}", f"--input={tmp_path / 'in.jsonl'}",
                   f"--output={tmp_path / 'out.jsonl'}", flag)
  assert process.returncode == 2
  assert message in process.stderr.splitlines()[-1] and process.stderr.count("error:") == 1
  assert {path.name for path in tmp_path.iterdir()} == {"in.jsonl"}


def test_plan_needs_no_weights(tmp_path, script, tiny_model, tiny_config):
  folder = tmp_path / "no_weights"
  folder.mkdir()
  for file in tiny_model.glob("*.json"):
    (folder / file.name).write_bytes(file.read_bytes())
  write_rows(tmp_path / "in.jsonl", ROWS + [{"id": f"q{i}", "prompt": "What is the time? " * 3}
                                            for i in range(3)])
  flags = [f"--config={tiny_config}", f"--input={tmp_path / 'in.jsonl'}",
           f"--config.model.path={folder}"]
  process = script("plan", *flags, "--chip=h100", "--json")
  assert process.returncode == 0, process.stderr
  plan = json.loads(process.stdout)
  assert (plan["rows"], plan["requests"], plan["chip"]) == (7, 6, "h100")
  assert plan["errors"] == ["row 3 (c): max_tokens must be an integer of at least 0, got 'many'"]
  assert plan["optimum"] <= plan["prompt_tokens_computed"] < plan["prompt_tokens_asked"]
  assert {bucket["kind"] for bucket in plan["first_window"]["buckets"]} == {"mixed", "decode"}


def test_a_converted_model_writes_the_same_texts(tmp_path, script, tiny_model, tiny_config, done):
  process = script("convert", f"--source={tiny_model}", f"--target={tmp_path / 'there'}",
                   "--format=orbax")
  assert process.returncode == 0, process.stderr
  write_rows(tmp_path / "in.jsonl", ROWS)
  process = script("run", f"--config={tiny_config}", f"--config.model.path={tmp_path / 'there'}",
                   f"--input={tmp_path / 'in.jsonl'}", f"--output={tmp_path / 'out.jsonl'}",
                   "--quiet")
  assert process.returncode == 3, process.stderr
  rows, before = read_rows(tmp_path / "out.jsonl"), read_rows(done[0] / "out.jsonl")
  assert rows[0]["text"] == before[0]["text"] and rows[2] == before[2]
  assert rows[1]["response"]["body"]["choices"] == before[1]["response"]["body"]["choices"]


NUM_LONG = 120


@pytest.fixture
def long_job(tmp_path, tiny_config):
  """A job of seconds: the command, and a function that starts it and waits for its first rows."""
  write_rows(tmp_path / "in.jsonl", [
      {"id": f"r{i}", "prompt": f"Question {i}", "max_tokens": 60, "ignore_eos": True}
      for i in range(NUM_LONG)])
  command = [sys.executable, "scripts/run.py", f"--config={tiny_config}",
             f"--input={tmp_path / 'in.jsonl'}", f"--output={tmp_path / 'out.jsonl'}",
             "--config.engine.max_rows=2"]
  kwargs = dict(cwd=ROOT, text=True, env=os.environ | {
      "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)})
  journal = tmp_path / "out.jsonl.job/journal.jsonl"
  journal_size = lambda: journal.stat().st_size if journal.exists() else 0

  def start():
    before = journal_size()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **kwargs)
    while process.poll() is None and journal_size() == before:
      time.sleep(0.01)
    process.send_signal(signal.SIGSTOP)  # so that it cannot end before it is asked to
    assert process.poll() is None, process.communicate()[1]
    return process
  return start, lambda: subprocess.run(command, capture_output=True, **kwargs)


def stop(process, number):
  process.send_signal(number)
  process.send_signal(signal.SIGCONT)
  return process.communicate()[1]


def test_a_signal_stops_the_job_with_a_hint_and_it_goes_on(tmp_path, long_job):
  start, run = long_job
  process = start()
  second = run()
  stderr = stop(process, signal.SIGTERM)
  assert second.returncode == 2
  assert f"in use by process {process.pid}: wait for it or stop it" in second.stderr
  assert process.returncode == 130, stderr
  assert (f"finished rows are kept in {tmp_path / 'out.jsonl.job'}: run the same command again to "
          "go on") in stderr
  assert re.search(r"^\d:\d\d:\d\d  stopped; \d+/\d+ requests; ", stderr, re.MULTILINE)
  kept = read_rows(tmp_path / "out.jsonl.job/journal.jsonl")
  assert 0 < len(kept) < NUM_LONG
  assert not (tmp_path / "out.jsonl").exists()

  process = start()
  stderr = stop(process, signal.SIGINT)
  assert process.returncode == 130, stderr
  assert read_rows(tmp_path / "out.jsonl.job/journal.jsonl")[:len(kept)] == kept

  finished = run()
  assert finished.returncode == 0, finished.stderr
  rows = read_rows(tmp_path / "out.jsonl")
  assert [row["id"] for row in rows] == [f"r{i}" for i in range(NUM_LONG)]
  assert all(line["output"] in rows for line in kept)
