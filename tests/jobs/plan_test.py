"""What a plan says of a file before anything runs."""

import json
import os

import pytest

from batchjax.config import ConfigError, EngineConfig, JobConfig, MeshConfig, ModelSource
from batchjax.jobs.plan import plan_file, to_text
from batchjax.jobs.run import Loaders
from batchjax.plan.cost import CHIPS
from batchjax.testing.fake_model import fake_config
from batchjax.testing.fake_tokenizer import FakeTokenizer
from batchjax.types import SamplingParams

PREFIX = "A prefix of forty characters, of them all"
NUM_GOOD = 12


def fail(source):
  raise AssertionError("the model was loaded")


def plan(tmp_path, rows=None, **engine):
  rows = rows or [{"id": f"r{i}", "prompt": PREFIX + f"{i:04}", "max_tokens": 10}
                  for i in range(NUM_GOOD)] + [{"id": "bad"}]
  (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
  values = dict(max_rows=4, max_step_tokens=64, page_size=4, num_pages=200)
  config = JobConfig(model=ModelSource(path=os.devnull), engine=EngineConfig(**values | engine),
                     sampling=SamplingParams(max_tokens=10))
  loaders = Loaders(lambda source: fake_config(max_len=256), lambda source: FakeTokenizer(), fail)
  return plan_file(config, str(tmp_path / "in.jsonl"), tmp_path, CHIPS["h100"], loaders)


def test_stop_strings_need_no_automata(tmp_path):
  # Rows of known length, and a pool in which some are preempted.
  rows = [{"id": f"r{i}", "prompt": f"{i:04}", "max_tokens": 60, "stop": ["x", "yz"],
           "ignore_eos": i % 2 == 0} for i in range(8)]
  assert plan(tmp_path, rows, num_pages=40)["requests"] == len(rows)


def test_counts_and_sharing(tmp_path):
  values = plan(tmp_path)
  assert (values["rows"], values["requests"], values["windows"]) == (NUM_GOOD + 1, NUM_GOOD, 1)
  assert values["errors"] == [f"row {NUM_GOOD + 1} (bad): the row has no prompt or messages or "
                              "prompt_token_ids: give it one"]
  prompt_len = len(PREFIX) + 4
  assert values["prompt_tokens_asked"] == NUM_GOOD * prompt_len
  # The prefix and "00" once, then two digits each; the optimum shares equal first digits too.
  assert values["optimum"] <= values["prompt_tokens_computed"] <= prompt_len + NUM_GOOD * 4
  assert values["decode_tokens_at_most"] == NUM_GOOD * 10
  assert values["shared_nodes"] >= 1
  assert values["chip"] == "h100" and values["first_window"]["predicted_secs"] > 0
  assert values["memory"]["total_bytes"] == sum(
      size for name, size in values["memory"].items() if name.endswith("_bytes")
      and name != "total_bytes")
  assert json.loads(json.dumps(values)) == values


def test_without_sharing_all_is_computed(tmp_path):
  values = plan(tmp_path, share_prefixes=False)
  assert values["prompt_tokens_computed"] == values["prompt_tokens_asked"]
  assert values["shared_nodes"] == 0 and values["optimum"] < values["prompt_tokens_asked"]


@pytest.mark.parametrize("plan_window, windows", [(5, 3), (4, 3), (12, 1)])
def test_windows_add_up(tmp_path, plan_window, windows):
  values = plan(tmp_path, plan_window=plan_window)
  whole = plan(tmp_path)
  assert values["windows"] == windows
  for name in ("prompt_tokens_asked", "decode_tokens_at_most"):
    assert values[name] == whole[name]
  assert values["prompt_tokens_computed"] >= whole["prompt_tokens_computed"]


def test_text_says_the_same(tmp_path):
  values = plan(tmp_path)
  text = to_text(values)
  assert "13: 12 requests, 1 errors" in text and values["errors"][0] in text
  assert f"{values['prompt_tokens_asked']:,} tokens asked" in text
  assert f"{values['prompt_tokens_computed']:,} computed" in text
  for bucket in values["first_window"]["buckets"]:
    assert f"{bucket['kind']}: {bucket['tokens']} tokens, {bucket['rows']} rows" in text
  words = " ".join(text.split())
  secs = values["predicted"]
  assert f"predicted {secs['total_secs']:,.1f} s in all: " in words
  assert f"s at least in steps on 1 x h100, {secs['compile_secs']:,.1f} s compiling" in words
  assert "GB of weights at 1.00 GB/s" in words
  assert max(len(line) for line in text.splitlines() if values["errors"][0] not in line) <= 80


def test_predicted_seconds_have_compiling_and_loading_in_them(tmp_path):
  values = plan(tmp_path, compile_secs=3.0, first_compile_secs=5.0, plan_window=6)
  secs, first = values["predicted"], values["first_window"]
  assert secs["compile_secs"] == 5 + 3 * len(first["buckets"])
  assert secs["step_secs"] == pytest.approx(2 * first["predicted_secs"], abs=0.01), "two like windows"
  assert secs["load_secs"] == round(values["memory"]["weight_bytes"] / secs["load_bytes_per_sec"], 2)
  assert secs["total_secs"] == pytest.approx(
      secs["step_secs"] + secs["compile_secs"] + secs["load_secs"], abs=0.02)
  assert "if windows are like the first" in " ".join(to_text(values).split())


def test_a_plan_for_a_mesh_is_of_each_device(tmp_path):
  one, four = plan(tmp_path), plan(tmp_path, mesh=MeshConfig(4))
  assert four["num_devices"] == 4 and four["memory"]["weight_bytes"] < one["memory"]["weight_bytes"]
  text = " ".join(to_text(four).split())
  assert "activations, on each of 4 devices" in text and "in steps on 4 x h100" in text
  with pytest.raises(ConfigError, match="engine.mesh.tensor=0 takes all devices .* name their number"):
    plan(tmp_path, mesh=MeshConfig(0))
  with pytest.raises(ConfigError, match="engine.mesh.tensor=3 does not divide the 8 query heads"):
    plan(tmp_path, mesh=MeshConfig(3))


def test_a_file_of_bad_rows_only(tmp_path):
  values = plan(tmp_path, rows=[{"id": str(i)} for i in range(15)])
  assert (values["requests"], values["windows"], values["first_window"]) == (0, 0, None)
  text = to_text(values)
  assert "15: 0 requests, 15 errors" in text and "row 10 (9)" in text and "row 11" not in text
