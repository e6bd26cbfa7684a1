"""Text in, text out, from Python: as a file's job, errors with their place, a training loop."""

import json

import jax
import numpy as np
import optax
import pytest

import batchjax
from batchjax.config import ConfigError, EngineConfig

ENGINE = EngineConfig(num_pages=200, page_size=8, max_rows=8, max_step_tokens=64,
                      max_decode_steps=4, max_buckets=1)
COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"
ROWS = [
    {"prompt": "What is the time?", "max_tokens": 6},
    {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 5},
    {"prompt": "What is the day?", "max_tokens": 9, "n": 2, "seed": 5, "temperature": 1,
     "echo": True},
    {"prompt_token_ids": [7, 8, 9], "max_tokens": 7, "stop": ["e", "th"]},
]

pytestmark = pytest.mark.usefixtures("quick_compiler_of_module")


@pytest.fixture(scope="module")
def loaded(tiny_model) -> batchjax.Loaded:
  return batchjax.load(tiny_model)


@pytest.fixture(scope="module")
def rows_done(loaded) -> list[batchjax.TextCompletion]:
  return batchjax.complete(loaded, ROWS, engine=ENGINE, temperature=0, logprobs=True)


def test_it_gives_what_a_job_over_a_file_gives(rows_done, tiny_model, tmp_path):
  (tmp_path / "in.jsonl").write_text("".join(
      json.dumps(row | {"return_token_ids": True}) + "\n" for row in ROWS))
  config = batchjax.JobConfig(batchjax.ModelSource(str(tiny_model)), ENGINE,
                              batchjax.SamplingParams(temperature=0.0, logprobs=True))
  batchjax.run(config, str(tmp_path / "in.jsonl"), str(tmp_path / "out.jsonl"), quiet=True)
  lines = [json.loads(line) for line in (tmp_path / "out.jsonl").open()]
  assert len(lines) == len(rows_done) == 4
  for line, completion in zip(lines, rows_done):
    assert line["id"] == completion.request_id
    for choice, want in zip(completion.choices, line.get("choices", [line]), strict=True):
      assert (choice.text, choice.finish_reason) == (want["text"], want["finish_reason"])
      assert choice.token_ids.tolist() == want["token_ids"]
      logprobs = [token["logprob"] for token in want["logprobs"]]
      np.testing.assert_allclose(choice.logprobs, logprobs, atol=1e-5)


def test_a_completion_shows_its_first_sample_and_its_prompt(rows_done, loaded):
  for row, completion in zip(ROWS, rows_done):
    first = completion.choices[0]
    assert (completion.text, completion.finish_reason) == (first.text, first.finish_reason)
    assert completion.token_ids is first.token_ids
    assert len(completion.prompt_token_ids) == completion.num_prompt_tokens
  chat = loaded.tokenizer.decode(rows_done[1].prompt_token_ids, skip_special_tokens=False)
  assert chat == "<|user|>Hello</s><|assistant|>"  # the model's own template
  assert rows_done[2].text.startswith("What is the day?")  # echoed


@pytest.mark.parametrize("one, many", [
    ("The end", ["The end"]), (ROWS[1]["messages"], [ROWS[1]["messages"]]),
    ([7, 8, 9], [[7, 8, 9]]), (np.array([7, 8, 9]), [(7, 8, 9)]), (ROWS[0], [ROWS[0]]),
    (ROWS[0], iter([ROWS[0]])),
], ids=["text", "messages", "ids", "array", "row", "iterator"])
def test_one_prompt_needs_no_list(one, many, loaded):
  complete = lambda prompts: batchjax.complete(
      loaded, prompts, engine=ENGINE, temperature=0, max_tokens=4)
  (alone,), (listed,) = complete(one), complete(many)
  assert alone.token_ids.tolist() == listed.token_ids.tolist()
  assert alone.prompt_token_ids.tolist() == listed.prompt_token_ids.tolist()


def test_seeds_are_of_the_job_and_equal_prompts_differ(loaded):
  complete = lambda seed: [c.token_ids.tolist() for c in batchjax.complete(
      loaded, ["What is"] * 3, engine=ENGINE, max_tokens=8, seed=seed, ignore_eos=True)]
  first = complete(0)
  assert first == complete(0) != complete(1)
  assert len({tuple(tokens) for tokens in first}) == 3


def test_nothing_to_complete(loaded):
  assert batchjax.complete(loaded, []) == []


def test_progress_is_shown_where_asked(loaded, capfd):
  batchjax.complete(loaded, ROWS[0], engine=ENGINE, temperature=0)
  assert capfd.readouterr() == ("", "")
  batchjax.complete(loaded, ROWS[0], engine=ENGINE, temperature=0, progress=True)
  out, err = capfd.readouterr()
  assert not out and "completing" in err and "100%" in err


@pytest.mark.parametrize("prompts, fields, told", [
    ("", {}, r"prompts\[0\]: prompt is empty: give it at least one character"),
    (["a", []], {}, r"prompts\[1\]: prompt_token_ids is empty: give it at least one token"),
    (["a", None], {}, r"prompts\[1\]: the row has no prompt or messages or prompt_token_ids: give"),
    ("a", {"temprature": 1}, r"temprature is not a field of this row: did you mean temperature\?"),
    ("a", {"temperature": "hot"}, "temperature must be a finite number, got 'hot'"),
    ("a", {"stop": [""]}, "stop must be a non-empty string or a list of them"),
    ("a" * 300, {}, "the prompt has 301 tokens, .* the context of 256: shorten it to at most 255"),
    ("a", {"max_tokens": 300}, "max_tokens is 300, together over the context of 256"),
    ([[7, 400]], {}, "prompt token 1 is 400, but the model's vocabulary has 128 tokens: use the"),
    ([[{"role": "user"}]], {}, r"messages\[0\].content"),
    (["a", "b"], {"id": "x"}, r"prompts\[1\]: id 'x' is used by an earlier row: make it unique"),
    (5, {}, "prompts must be a text, messages, token ids, a row, or a list of these, got 5"),
])
def test_what_is_wrong_is_told_with_its_place_and_remedy(prompts, fields, told, loaded):
  with pytest.raises(ConfigError, match=told):
    batchjax.complete(loaded, prompts, engine=ENGINE, **fields)


def test_messages_without_a_chat_template(loaded, tmp_path):
  loaded.tokenizer.chat_templates, templates = {}, loaded.tokenizer.chat_templates
  try:
    with pytest.raises(ConfigError, match=r"prompts\[0\]: the model has no chat template: give"):
      batchjax.complete(loaded, ROWS[1]["messages"], engine=ENGINE)
    (tmp_path / "chat.jinja").write_text("{{ messages[0].content }}!")
    completion, = batchjax.complete(loaded, ROWS[1]["messages"], engine=ENGINE, temperature=0,
                                    max_tokens=4, chat_template=str(tmp_path / "chat.jinja"))
    assert loaded.tokenizer.decode(completion.prompt_token_ids) == "Hello!"
  finally:
    loaded.tokenizer.chat_templates = templates


def test_load_names_what_is_wrong(tiny_model, tmp_path):
  with pytest.raises(ConfigError, match="is neither a .gguf file nor a folder with config.json"):
    batchjax.load(tmp_path)
  with pytest.raises(ConfigError, match=r"load has unknown fields \['dtyp'\]; known: \['dtype'"):
    batchjax.load(tiny_model, dtyp="bfloat16")
  with pytest.raises(ConfigError, match="model.path is empty: name a Hugging Face folder"):
    batchjax.load()


def test_stop_tokens_are_told_and_belong_to_what_was_drawn(loaded):
  greedy = dict(engine=ENGINE, temperature=0, max_tokens=8)
  whole, = batchjax.complete(loaded, "What is", ignore_eos=True, **greedy)
  last = int(whole.token_ids[4])
  at = whole.token_ids.tolist().index(last)
  ended, = batchjax.complete(loaded, "What is", ignore_eos=True, stop_token_ids=[last], **greedy)
  choice = ended.choices[0]
  assert (choice.finish_reason, choice.stop_token_id) == ("stop", last)
  assert choice.token_ids.tolist() == whole.token_ids[:at].tolist()
  assert choice.drawn_token_ids.tolist() == whole.token_ids[:at + 1].tolist()
  assert whole.choices[0].stop_token_id == -1
  assert whole.choices[0].drawn_token_ids.tolist() == whole.token_ids.tolist()


def test_a_training_loop_compiles_once_and_learns(loaded):
  """Policy gradient on a reward for one token; new parameters go into the steps that are there."""
  optimizer, wanted, length = optax.adam(0.02), 10, 8
  state = optimizer.init(loaded.model)
  compiles, rewards = [], []

  @jax.jit
  def train(model, state, tokens, weights):
    def loss(model):
      logits, targets = batchjax.forward(model, tokens[:, :-1]).logits, tokens[:, 1:]
      return (weights * optax.softmax_cross_entropy_with_integer_labels(logits, targets)).mean()
    updates, state = optimizer.update(jax.grad(loss)(model), state, model)
    return optax.apply_updates(model, updates), state

  def listen(event, duration, **kwargs):
    if event == COMPILE_EVENT:
      compiles.append(len(rewards))

  jax.monitoring.register_event_duration_secs_listener(listen)
  try:
    for step in range(6):
      completion, = batchjax.complete(loaded, "The", n=16, max_tokens=length, seed=step,
                                      engine=ENGINE, ignore_eos=True)
      prompt = completion.prompt_token_ids
      tokens = np.stack([np.append(prompt, choice.drawn_token_ids)
                         for choice in completion.choices])
      reward = (tokens[:, len(prompt):] == wanted).mean(axis=1)
      weights = np.zeros((16, tokens.shape[1] - 1), np.float32)
      weights[:, len(prompt) - 1:] = (reward - reward.mean() + 1e-3)[:, None]
      model, state = train(loaded.model, state, tokens, weights)
      loaded = loaded._replace(model=model)
      rewards.append(reward.mean())
  finally:
    jax.monitoring.unregister_event_duration_listener(listen)
  assert set(compiles) == {0}, compiles  # all that compiles does so in the first step
  assert rewards[-1] > rewards[0] + 0.1, rewards
