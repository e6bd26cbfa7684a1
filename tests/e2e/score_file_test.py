"""Log-probabilities of continuations: a file in, a file out, and what they must agree with."""

import json
import math

import fake_job
import numpy as np
import pytest

from batchjax.config import EngineConfig, ModelSource
from batchjax.io import records
from batchjax.jobs import prepare
from batchjax.jobs.score import score_file
from batchjax.scoring import ScoreRequest, score
from batchjax.testing import oracle
from batchjax.testing.fake_tokenizer import FakeTokenizer
from batchjax.text.tokenizer import load_tokenizer
from batchjax.types import Request, SamplingParams
from batchjax.weights import load_model

PAIRS = [
    {"id": "x", "prompt": "The capital of France is", "continuation": " the best"},
    {"id": 7, "prompt": "The capital of France is", "continuation": " Rome"},
    {"prompt": "A", "continuation": "nd then some more words to read"},
]


@pytest.fixture(scope="module")
def scored(tmp_path_factory, script, tiny_config):
  folder = tmp_path_factory.mktemp("score")
  (folder / "in.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in PAIRS))
  process = script("score", f"--config={tiny_config}", f"--input={folder / 'in.jsonl'}",
                   f"--output={folder / 'out.jsonl'}")
  assert process.returncode == 0, process.stderr
  assert f"3 scores -> {folder / 'out.jsonl'}" in process.stdout
  return [record.value for record in records.read(folder / "out.jsonl")]


def test_rows_are_in_input_order_and_add_up(scored):
  assert [row["id"] for row in scored] == ["x", "7", "row-3"]
  for row in scored:
    assert len(row["token_logprobs"]) == row["num_tokens"] > 1
    assert math.isclose(sum(row["token_logprobs"]), row["logprob"], rel_tol=1e-6)
    assert row["logprob"] < 0


def test_scores_are_those_of_the_slow_oracle(scored, tiny_model):
  tokenizer, model = load_tokenizer(tiny_model), load_model(ModelSource(str(tiny_model)))
  params = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=True, top_logprobs=1)
  requests = [Request(str(i), np.array(tokenizer.encode(pair["prompt"] + pair["continuation"]),
                                       np.int32), params) for i, pair in enumerate(PAIRS)]
  for row, request, want in zip(scored, requests, oracle.oracle_generate(model, requests, 64)):
    count = row["num_tokens"]
    np.testing.assert_allclose(row["token_logprobs"], want.prompt_logprobs[-count:], atol=1e-4)
    greedy = want.prompt_top_token_ids[-count:, 0] == request.prompt_token_ids[-count:]
    assert row["is_greedy"] == greedy.all()


def test_is_greedy_holds_for_what_the_model_would_say(tiny_model):
  model = load_model(ModelSource(str(tiny_model)))
  prompt = np.array([1, 20, 30, 40], np.int32)
  request = Request("p", prompt, SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True))
  tokens = next(oracle.oracle_generate(model, [request], 64)).choices[0].token_ids
  other = tokens.copy()
  other[3] = (other[3] + 1) % 100
  engine = EngineConfig(max_rows=4, max_step_tokens=32, num_pages=32, max_buckets=1)
  scores = {s.request_id: s for s in score(model, [
      ScoreRequest("same", prompt, tokens), ScoreRequest("other", prompt, other)], engine)}
  assert scores["same"].is_greedy.all()
  assert scores["other"].is_greedy[:3].all() and not scores["other"].is_greedy[3]
  assert scores["same"].total > scores["other"].total
  np.testing.assert_allclose(scores["same"].logprobs[:3], scores["other"].logprobs[:3], atol=1e-5)


@pytest.mark.parametrize("row, message", [
    (b"{", r"row 2: the line is not valid JSON"),
    (b'{"prompt": "a", "continuation": ""}', r"row 2: continuation must be a string that is not"),
    (b'{"prompt": 3, "continuation": "b"}', r"row 2: prompt must be a string .* got 3"),
    (b'{"prompt": "a", "continuation": "b", "n": 1}', r"row 2: n is no field of a row to score"),
    (b'{"prompt": "a", "continuation": "b", "id": ["c"]}', r"row 2: id must be a string, got"),
    (b'{"prompt": "a", "continuation": "%s"}' % (b"x" * 300), r"row 2: .* tokens, the model takes"),
    (b'{"id": "x", "prompt": "a", "continuation": "b"}', r"row 2 \(x\): id 'x' is used by an earlier"),
    (b'{"prompt": "a", "continuation": "fail"}', r"row 2: the row cannot be processed \(KeyError: 0\)"),
])
def test_bad_rows_stop_it_before_the_model_loads(tmp_path, row, message):
  def no_model(source):
    raise AssertionError("the model was loaded")

  class Fragile(FakeTokenizer):
    def encode(self, text, add_special_tokens=True):
      return {}[0] if "fail" in text else super().encode(text)

  (tmp_path / "in.jsonl").write_bytes(json.dumps(PAIRS[0]).encode() + b"\n" + row + b"\n")
  with pytest.raises(prepare.BadRow, match=message):
    score_file(fake_job.config(), str(tmp_path / "in.jsonl"),
                          str(tmp_path / "out.jsonl"), fake_job.fake_loaders(Fragile, no_model))
  assert {path.name for path in tmp_path.iterdir()} == {"in.jsonl"}
