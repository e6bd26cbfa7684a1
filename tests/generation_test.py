"""The whole loop on a real transformer and on the fake one."""

import collections
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from batchjax.config import ConfigError, EngineConfig, MeshConfig
from batchjax.engine.compile import CompileRecord
from batchjax.engine.device import chip_of, memory_limit
from batchjax.generation import StepEvent, generate
from batchjax.models import SHAPES
from batchjax.plan.planner import Plan
from batchjax.testing.fake_model import FakeModel, fake_config
from batchjax.testing.on_mesh import on_mesh
from batchjax.testing.oracle import assert_same, oracle_generate
from batchjax.types import Request, SamplingParams
from batchjax.weights import Model
from batchjax.weights.random import random_params
from batchjax.weights.tree import nest, param_shapes

ENGINE = EngineConfig(num_pages=120, page_size=4, max_rows=6, max_step_tokens=24, max_buckets=1,
                      max_decode_steps=5, compilation_cache_dir="")
FAKE = Model(fake_config(eos=(5,)), {})
MAX_LEN = 64
COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"

# Texts do not depend on how well the steps were optimised, and less of it takes less time.
pytestmark = pytest.mark.usefixtures("quick_compiler_of_module")


@pytest.fixture(scope="module")
def llama() -> Model:
  return Model(SHAPES["tiny_llama"], random_params(SHAPES["tiny_llama"], seed=0))


def make_requests(params, num=10):
  rng = np.random.default_rng(2)
  base = rng.integers(0, 97, 30)
  return [Request(f"r{i}", np.append(base[:[30, 17, 5][i % 3]],
                                     rng.integers(0, 97, rng.integers(0, 12))).astype(np.int32),
                  params[i % len(params)]) for i in range(num)]


# Two samplers only, so that few shapes of the oracle's draw are compiled.
REQUESTS = make_requests((
    SamplingParams(temperature=0.0, max_tokens=16, logprobs=True),
    SamplingParams(temperature=1.0, max_tokens=11, n=2, seed=7, prompt_logprobs=True)))


@pytest.fixture(scope="module")
def oracle(llama):
  return {c.request_id: c for c in oracle_generate(llama, REQUESTS, MAX_LEN)}


@pytest.mark.parametrize("change", [
    {},
    dict(share_prefixes=False, lookahead=3, page_size=1, num_pages=400),
    dict(max_levels=1, page_size=16, num_pages=20, max_rows=4, max_step_tokens=9, lookahead=0,
         plan_window=4),
    dict(mesh=MeshConfig(2), page_size=8), dict(mesh=MeshConfig(4), max_levels=2),
], ids=str)
def test_a_transformer_equals_the_oracle_token_for_token(change, llama, oracle):
  engine = dataclasses.replace(ENGINE, **change)
  got = {c.request_id: c for c in generate(on_mesh(llama, engine.mesh), REQUESTS, engine)}
  assert len(got) == len(REQUESTS)
  for request_id, want in oracle.items():
    assert_same(got[request_id], want, atol=1e-3)


@pytest.mark.parametrize("family, size", [("qwen2", 8), ("gemma3", 4)])
def test_families_on_a_mesh_give_the_tokens_of_one_device(family, size):
  """Sizes that do not divide are filled up; one KV head stands on several devices."""
  config = dataclasses.replace(SHAPES[f"tiny_{family}"], num_heads=8, num_kv_heads=2, ffn_size=62,
                               vocab_size=253)
  rng = np.random.default_rng(3)  # of the host, which compiles nothing
  whole = Model(config, nest({path: jnp.asarray(rng.normal(size=shape) / 6, jnp.float32)
                              for path, shape in param_shapes(config).items()}))
  params = SamplingParams(temperature=0.7, top_k=40, max_tokens=8, logprobs=True, top_logprobs=2)
  one, many = ({c.request_id: c for c in generate(
      on_mesh(whole, mesh), make_requests([params], 5), dataclasses.replace(ENGINE, mesh=mesh))}
               for mesh in (MeshConfig(1), MeshConfig(size)))
  for request_id, want in one.items():
    assert_same(many[request_id], want)


def test_a_model_on_another_mesh_is_refused(llama):
  engine = dataclasses.replace(ENGINE, mesh=MeshConfig(2))
  for model, other in ((llama, engine), (on_mesh(llama, engine.mesh), ENGINE)):
    with pytest.raises(ConfigError, match="laid out for engine.mesh.tensor=.*load it with that mesh"):
      list(generate(model, REQUESTS, other))
  with pytest.raises(ConfigError, match="tensor=9 needs as many devices, JAX finds 8"):
    list(generate(llama, REQUESTS, dataclasses.replace(ENGINE, mesh=MeshConfig(9))))


def test_a_row_whose_logits_are_nan_ends_and_spoils_no_other(llama, oracle):
  counts = collections.Counter(t for r in REQUESTS for t in set(r.prompt_token_ids.tolist()))
  token = next(t for t, count in counts.items() if count in (2, 3))  # one that few prompts hold
  params = jax.tree.map(lambda x: x, llama.params)
  table = params["params"]["embed"]["embedding"]
  params["params"]["embed"]["embedding"] = table.at[token].set(jnp.nan)
  got = {c.request_id: c for c in generate(Model(llama.config, params), REQUESTS, ENGINE)}
  num_errors = 0
  for request in REQUESTS:
    for choice, want in zip(got[request.request_id].choices, oracle[request.request_id].choices):
      if token in request.prompt_token_ids:
        assert choice.finish_reason == "error" and not len(choice.token_ids)
      elif token in want.token_ids[:-1]:  # as far as its own token
        num_kept = 1 + want.token_ids.tolist().index(token)
        assert choice.finish_reason == "error"
        assert choice.token_ids.tolist() == want.token_ids[:num_kept].tolist()
      else:
        assert choice.finish_reason == want.finish_reason
        assert choice.token_ids.tolist() == want.token_ids.tolist()
      num_errors += choice.finish_reason == "error"
  assert num_errors >= 2


def greedy(num=8, **params):
  return make_requests([SamplingParams(temperature=0.0, **params)], num)


@pytest.mark.parametrize("seed", range(3))
def test_rows_that_end_unforeseen_move_down_to_narrower_loops(seed):
  """Slots stay as they are: a narrow loop serves rows in slots past its width."""
  rng = np.random.default_rng(seed)
  requests = [Request(f"r{i}", rng.integers(0, 97, rng.integers(1, 12)).astype(np.int32),
                      SamplingParams(temperature=0.0, max_tokens=int(rng.integers(1, 50))))
              for i in range(int(rng.integers(20, 40)))]
  model = Model(fake_config(eos=tuple(range(4))), {})
  texts, widths, has_moved_down = [], [], False

  def observe(event):
    nonlocal has_moved_down
    if isinstance(event, StepEvent) and event.bucket.kind == "decode":
      widths.append(event.bucket.num_rows)
      has_moved_down |= bool(event.batch.samples.slot.max() >= event.bucket.num_rows)

  for lookahead, max_buckets in ((1, 2), (0, 1)):
    engine = dataclasses.replace(ENGINE, max_rows=16, compile_secs=0.0, lookahead=lookahead,
                                 max_buckets=max_buckets, num_pages=400)
    texts.append({c.request_id: c.choices[0].token_ids.tolist()
                  for c in generate(model, requests, engine, observe=observe,
                                    module_class=FakeModel)})
  assert texts[0] == texts[1]
  assert set(widths) == {8, 16} and has_moved_down


def test_a_job_of_one_token_a_row_compiles_no_loop():
  requests, records = greedy(max_tokens=1), []
  got = list(generate(FAKE, requests, ENGINE, observe=records.append, module_class=FakeModel))
  names = [record.name for record in records if isinstance(record, CompileRecord)]
  assert len(got) == len(requests) and [name.split()[0] for name in names] == ["mixed"]


def test_nothing_compiles_after_warm_up():
  """No backend compile between the first step and the last, windows of new lengths included."""
  compiles, at_steps = [], []

  def listen(event, duration, **kwargs):
    if event == COMPILE_EVENT:
      compiles.append(duration)

  def observe(event):
    if isinstance(event, StepEvent):
      at_steps.append(len(compiles))

  params = [SamplingParams(temperature=0.7, max_tokens=m, presence_penalty=1.0) for m in (3, 9, 20)]
  jax.monitoring.register_event_duration_secs_listener(listen)
  try:
    done = list(generate(FAKE, make_requests(params, 17),
                         dataclasses.replace(ENGINE, plan_window=5), module_class=FakeModel,
                         observe=observe))
  finally:
    jax.monitoring.unregister_event_duration_listener(listen)
  assert len(done) == 17 and len(at_steps) > 5
  assert at_steps[0] >= 3, "the listener hears no compiles"
  assert at_steps[-1] == at_steps[0]


def test_transfers_are_guarded_in_the_loop_and_free_outside():
  guards = []

  def observe(event):
    if isinstance(event, StepEvent):
      guards.append(jax.config.jax_transfer_guard_device_to_host)
      with pytest.raises(Exception, match="[Dd]isallowed host-to-device"):
        jnp.sin(np.ones(3)).block_until_ready()

  before = jax.config.jax_transfer_guard_host_to_device
  num = 0
  for _ in generate(FAKE, greedy(6), ENGINE, module_class=FakeModel, observe=observe):
    num += 1
    assert jax.config.jax_transfer_guard_host_to_device == before
    assert float(jnp.sin(np.zeros(3)).sum()) == 0.0  # the consumer may do as it likes
  assert num == 6 and set(guards) == {"disallow"}
  assert jax.config.jax_transfer_guard_host_to_device == before


def test_abandoning_the_loop_leaves_the_guard_off():
  before = jax.config.jax_transfer_guard_host_to_device
  completions = generate(FAKE, greedy(6), ENGINE, module_class=FakeModel)
  next(completions)
  completions.close()
  assert jax.config.jax_transfer_guard_host_to_device == before


def test_observers_see_plans_compiles_and_steps_in_order():
  events = []
  list(generate(FAKE, greedy(8), dataclasses.replace(ENGINE, plan_window=3),
                module_class=FakeModel, observe=events.append))
  kinds = collections.Counter(type(event) for event in events)
  assert kinds[Plan] == 3 and kinds[CompileRecord] == 2 and kinds[StepEvent] > 3
  first_step = next(i for i, event in enumerate(events) if isinstance(event, StepEvent))
  assert all(not isinstance(event, CompileRecord) for event in events[first_step:])
  steps = [event for event in events if isinstance(event, StepEvent)]
  for step in steps:
    assert step.batch.num_tokens <= step.bucket.num_tokens and step.batch.kind == step.bucket.kind
    assert step.host_secs > 0 and step.step_secs > 0 and step.launch_secs > 0


def test_tokens_of_events_are_those_of_the_completions():
  steps = []
  done = list(generate(FAKE, greedy(5, ignore_eos=True, max_tokens=9), ENGINE,
                       module_class=FakeModel,
                       observe=lambda e: isinstance(e, StepEvent) and steps.append(e)))
  assert sum(step.generated_tokens for step in steps) == 5 * 9
  assert steps[-1].num_finished == len(done) == 5


def test_completions_come_as_they_finish():
  short = Request("short", np.arange(4, dtype=np.int32), SamplingParams(temperature=0.0,
                                                                        max_tokens=1))
  long = Request("long", np.arange(5, 9, dtype=np.int32), SamplingParams(
      temperature=0.0, max_tokens=60, ignore_eos=True))
  got = [c.request_id for c in generate(FAKE, [long, short], ENGINE, module_class=FakeModel)]
  assert got == ["short", "long"]


def test_no_requests_is_no_work():
  assert list(generate(FAKE, [], ENGINE, module_class=FakeModel)) == []


def test_a_request_that_never_fits_is_named():
  big = Request("big", np.zeros(500, np.int32), SamplingParams(max_tokens=1))
  with pytest.raises(ConfigError, match="'big'.*num_pages"):
    list(generate(FAKE, [*greedy(2), big], ENGINE, module_class=FakeModel))


def test_memory_that_others_hold_is_not_ours():
  class Device:
    def __init__(self, **stats):
      self.memory_stats = lambda: stats or None

  params = {"w": np.zeros(100, np.float32)}
  assert memory_limit(Device()) is None
  assert memory_limit(Device(bytes_limit=5000)) == 5000
  assert memory_limit(Device(bytes_limit=5000, bytes_in_use=1400), params) == 4000
  assert memory_limit(Device(bytes_limit=5000, bytes_in_use=300), params) == 5000
  assert memory_limit(jax.devices()[0], params) is None


def test_every_device_has_a_roofline(caplog):
  class Device:
    def __init__(self, platform, device_kind):
      self.platform, self.device_kind = platform, device_kind

  known = {"NVIDIA H100 80GB HBM3": "h100", "Tesla T4": "t4", "TPU v5 lite": "v5e", "TPU7x": "tpu7x"}
  for kind, name in known.items():
    assert chip_of(Device("tpu" if "TPU" in kind else "gpu", kind)).name == name
  assert not caplog.records
  assert chip_of(Device("gpu", "abacus")).name == "a100"
  assert "abacus" in caplog.text
  assert chip_of(jax.devices()[0]).name == "cpu"
