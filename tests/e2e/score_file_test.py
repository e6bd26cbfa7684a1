"""Files of continuations to score: what they say, in every format, whatever happens on the way."""

import dataclasses
import functools
import gzip
import json
import math

import fake_job
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from batchjax import report
from batchjax.config import ModelSource
from batchjax.io import output, records
from batchjax.jobs.plan import plan_file
from batchjax.jobs.prepare import BadRow
from batchjax.jobs.run import run
from batchjax.plan.cost import CHIPS
from batchjax.testing import oracle
from batchjax.testing.fake_model import fake_logits, FakeModel
from batchjax.testing.fake_tokenizer import FakeTokenizer
from batchjax.text.tokenizer import load_tokenizer
from batchjax.types import Request, SCORING
from batchjax.weights import load_model

pytestmark = pytest.mark.usefixtures("quick_compiler_of_module")
SHARED = "Answer with one word only. "
ROWS = [
    {"id": "x", "prompt": SHARED + "Capital of France? ", "continuation": "Paris"},
    {"id": 7, "prompt": SHARED + "Capital of Italy?", "continuations": [" Rome", " Oslo", " Rome, of course"]},
    {"prompt": "A", "continuation": "nd then some more words to read"},
    {"id": "text", "text": SHARED},
    {"id": "bad", "prompt": "A", "continuations": ["b", ""]},
    {"id": "ids", "prompt_token_ids": [5, 6], "continuation_token_ids": [[7, 8], [9]]},
    {"id": "again", "prompt": SHARED + "Capital of Italy?", "continuation": " Rome"},
    {"id": "long", "prompt": "A", "continuations": ["b", "c" * 200]},
    {"id": "7[1]", "prompt": "A", "continuation": "b"},
]
ERRORS = [
    ("bad", 5, "continuations[1]", "continuations[1] must be a string that is not empty, got \"\""),
    ("long", 8, "prompt", "prompt and continuation have 201 tokens, which leaves no room in the context of "
     "128: shorten it to at most 128"),
    ("7[1]", 9, "id", "id '7[1]' is used by an earlier row: make it unique")]


def write(path, rows):
  text = "".join(json.dumps(row) + "\n" for row in rows)
  if path.suffix == ".parquet":
    rows = [row | {"id": str(row["id"])} if "id" in row else row for row in rows]
    schema = pa.unify_schemas([pa.Table.from_pylist([row]).schema for row in rows])
    pq.write_table(pa.Table.from_pylist(rows, schema), path)
  else:
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())


def score(folder, rows=ROWS, suffix=".jsonl", cache="", loaders=None, strict=False, **engine):
  """The rows of the output of a job on the fake model."""
  write(folder / f"in{suffix}", rows)
  config = dataclasses.replace(fake_job.config(cache, **engine), strict=strict)
  run(config, str(folder / f"in{suffix}"), str(folder / f"out{suffix}"), quiet=True, scores=True,
      loaders=loaders or fake_job.fake_loaders())
  return [pruned(record.value) for record in records.read(folder / f"out{suffix}")]


def pruned(value):
  if isinstance(value, list):
    return [pruned(item) for item in value]
  return {k: pruned(v) for k, v in value.items() if v is not None} if isinstance(value, dict) else value


def errors_of(folder, suffix=".jsonl"):
  return [(e.value["custom_id"], e.value["error"]["row"], e.value["error"]["param"],
           e.value["error"]["message"]) for e in records.read(folder / f"out.errors{suffix}")]


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
  return str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def scored(tmp_path_factory, cache):
  folder = tmp_path_factory.mktemp("scored")
  return folder, score(folder, cache=cache)


def expected_score(prompt, whole):
  """A score on the fake model without engine or cache; every token is one character."""
  logprobs, greedy = [], []
  for i in range(prompt, len(whole)):
    logits = fake_logits(np.array(whole[:i]), 97).astype(np.float64)
    logprobs.append(logits[whole[i]] - np.log(np.exp(logits).sum()))
    greedy.append(int(logits.argmax()) == whole[i])
  return {"logprob": pytest.approx(sum(logprobs), abs=1e-3), "num_tokens": len(logprobs),
          "is_greedy": all(greedy), "token_ids": whole[prompt:],
          "token_logprobs": pytest.approx(logprobs, abs=1e-4)}


def test_every_row_has_its_scores_in_the_order_of_the_input(scored):
  encode = FakeTokenizer().encode
  of_text = lambda prompt, text: expected_score(len(encode(prompt.rstrip())), encode(prompt + text))
  choices = lambda *fields: [{"index": i} | f for i, f in enumerate(fields)]
  italy = SHARED + "Capital of Italy?"
  want_text = expected_score(1, [0, *encode(SHARED)])
  want = [
      {"id": "x"} | of_text(SHARED + "Capital of France? ", "Paris"),
      {"id": "7", "choices": choices(*(of_text(italy, text) for text in ROWS[1]["continuations"]))},
      {"id": "row-3"} | of_text("A", ROWS[2]["continuation"]),
      {"id": "text"} | want_text | {"perplexity": pytest.approx(math.exp(
          -scored[1][3]["logprob"] / len(SHARED)), rel=1e-5)},
      {"id": "ids", "choices": choices(expected_score(2, [5, 6, 7, 8]), expected_score(2, [5, 6, 9]))},
      {"id": "again"} | of_text(italy, " Rome")]
  assert scored[1] == want
  assert scored[1][1]["choices"][0]["token_logprobs"] == scored[1][5]["token_logprobs"]


def test_bad_rows_are_error_rows_with_row_field_and_remedy(scored):
  assert errors_of(scored[0]) == ERRORS


def test_the_job_has_metrics_and_computed_each_prefix_once(scored):
  job, = report.read_runs(scored[0] / "out.jsonl.job" / report.METRICS_FILE)
  answered = [r.request_id for r in job.requests if r.finish_reason != "error"]
  assert len(set(answered)) == len(answered) == 9, "one for each continuation"
  computed = sum(step.prompt_tokens for step in job.steps)
  assert computed < 0.6 * sum(r.prompt_tokens for r in job.requests)
  assert {step.kind for step in job.steps} == {"mixed"}
  assert [c.bucket.split()[0] for c in job.compiles] == ["mixed"], "nothing decodes"


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".parquet"])
def test_other_formats_say_the_same(tmp_path, cache, scored, suffix):
  # A Parquet column of token ids is of lists, or of lists of lists.
  assert score(tmp_path, suffix=suffix, cache=cache) == scored[1]
  assert errors_of(tmp_path, suffix) == ERRORS


@pytest.mark.parametrize("engine", [
    dict(plan_window=2), dict(share_prefixes=False), dict(max_rows=1, max_step_tokens=7, lookahead=0),
    dict(page_size=16, num_pages=60, max_step_tokens=200)], ids=str)
def test_scores_depend_on_no_engine_setting(tmp_path, scored, engine):
  for ours, want in zip(score(tmp_path, **engine), scored[1], strict=True):
    for one, other in zip(ours.get("choices", [ours]), want.get("choices", [want]), strict=True):
      assert one.pop("token_logprobs") == pytest.approx(other["token_logprobs"], abs=1e-4)
      assert one["logprob"] == pytest.approx(other["logprob"], abs=1e-3)
      assert (one["token_ids"], one["is_greedy"]) == (other["token_ids"], other["is_greedy"])


def test_a_stopped_job_goes_on_with_the_same_bytes(tmp_path, cache, scored, monkeypatch):
  """Stopped when the first rows are kept, with requests of others in flight."""
  real = output.format_answer

  def fail_at_the_third(*args, **kwargs):
    if len((tmp_path / "out.jsonl.job/journal.jsonl").read_bytes().splitlines()) == len(ERRORS) + 2:
      raise KeyboardInterrupt
    return real(*args, **kwargs)

  monkeypatch.setattr(output, "format_answer", fail_at_the_third)
  with pytest.raises(KeyboardInterrupt):
    score(tmp_path, cache=cache)
  assert not (tmp_path / "out.jsonl").exists()
  monkeypatch.undo()
  score(tmp_path, cache=cache)
  for name in ("out.jsonl", "out.errors.jsonl"):
    assert (tmp_path / name).read_bytes() == (scored[0] / name).read_bytes()


def test_a_model_that_gives_nan_makes_error_rows_of_whole_rows(tmp_path, scored):
  loaders = dataclasses.replace(fake_job.fake_loaders(), module_class=functools.partial(
      FakeModel, nan_every=9))
  rows = score(tmp_path, loaders=loaders)
  errors = [e for e in errors_of(tmp_path) if "NaN" in e[3]]
  assert rows and errors and len(rows) + len(errors) == len(scored[1])
  assert {e[0] for e in errors} <= {"x", "7", "row-3", "text", "ids", "again"}, "ids of rows, not of parts"


def test_strict_stops_before_the_model_loads(tmp_path):
  def no_model(source):
    raise AssertionError("the model was loaded")

  with pytest.raises(BadRow, match=r"^row 5 \(bad\): continuations\[1\] must be"):
    score(tmp_path, loaders=fake_job.fake_loaders(model_fn=no_model), strict=True)
  assert {path.name for path in tmp_path.iterdir()} == {"in.jsonl"}


def test_messages_are_rendered_and_keep_the_templates_spaces(tmp_path, cache):
  class Chat(FakeTokenizer):
    chat_template = "{{ messages[0].content }}> "

  rows = score(tmp_path, [{"id": "m", "messages": [{"role": "user", "content": "Hi"}], "continuation": "x"},
                          {"id": "p", "prompt": "Hi> ", "continuation": "x"}], cache=cache,
               loaders=fake_job.fake_loaders(Chat))
  assert [row["num_tokens"] for row in rows] == [1, 2]
  assert rows[0]["token_logprobs"] == rows[1]["token_logprobs"][1:]


def test_a_plan_of_rows_to_score(tmp_path):
  write(tmp_path / "in.jsonl", ROWS)
  plan = plan_file(fake_job.config(), str(tmp_path / "in.jsonl"), tmp_path, CHIPS["cpu"],
                   fake_job.fake_loaders(), scores=True)
  assert (plan["rows"], plan["requests"], len(plan["errors"])) == (9, 9, len(ERRORS))
  assert plan["prompt_tokens_computed"] < 0.6 * plan["prompt_tokens_asked"]
  assert [bucket["kind"] for bucket in plan["first_window"]["buckets"]] == ["mixed"]


def test_the_script_scores_as_the_slow_oracle(tmp_path, script, tiny_config, tiny_model):
  rows = [row for row in ROWS if row.get("id") in ("x", 7, "text", "bad")]
  write(tmp_path / "in.jsonl", rows)
  process = script("score", f"--config={tiny_config}", f"--input={tmp_path / 'in.jsonl'}",
                   f"--output={tmp_path / 'out.jsonl'}")
  assert process.returncode == 3, process.stderr
  assert f"3 scores, 1 errors -> {tmp_path / 'out.jsonl'}" in process.stdout
  tokenizer, model = load_tokenizer(tiny_model), load_model(ModelSource(str(tiny_model)))
  texts = [rows[0]["prompt"] + "Paris", *(rows[1]["prompt"] + c for c in rows[1]["continuations"]), SHARED]
  requests = [Request(str(i), np.array(tokenizer.encode(text), np.int32), dataclasses.replace(
      SCORING, max_tokens=1)) for i, text in enumerate(texts)]
  got = [score for record in records.read(tmp_path / "out.jsonl")
         for score in record.value.get("choices", [record.value])]
  for ours, request, want in zip(got, requests, oracle.oracle_generate(model, requests, 128), strict=True):
    count = ours["num_tokens"]
    assert ours["token_ids"] == request.prompt_token_ids[-count:].tolist()
    np.testing.assert_allclose(ours["token_logprobs"], want.prompt_logprobs[-count:], atol=1e-4)
    greedy = want.prompt_top_token_ids[-count:, 0] == request.prompt_token_ids[-count:]
    assert ours["is_greedy"] == greedy.all()
  assert got[-1]["num_tokens"] == len(requests[-1].prompt_token_ids) - 1, "all but BOS"
