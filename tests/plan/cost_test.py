import dataclasses

import numpy as np
import pytest

from batchjax.config import ModelConfig
from batchjax.plan import cost
from batchjax.plan.grouping import choose_nodes
from batchjax.plan.prefix_tree import build_prefix_tree

LLAMA_8B = ModelConfig("llama", vocab_size=128_256, hidden_size=4096, ffn_size=14_336,
                       num_layers=32, num_heads=32, num_kv_heads=8, head_dim=128, max_len=8192,
                       dtype="bfloat16")
H100 = cost.CHIPS["h100"]


def test_a_decode_step_of_an_8b_model_reads_its_weights():
  step = cost.step_cost(LLAMA_8B, H100, 256, 256, 0, 0)
  # 7.5e9 parameters less the token embedding, in bfloat16; 256 rows are below the ridge.
  assert step.hbm_bytes == pytest.approx(15.05e9, rel=0.01)
  assert step.secs == step.hbm_bytes / H100.hbm_bytes_per_sec + H100.step_overhead_secs
  assert step.flops == pytest.approx(2 * 256 * 7.5e9, rel=0.01)


def test_a_prefill_step_is_bound_by_flops():
  step = cost.step_cost(LLAMA_8B, H100, 8192, 1, 0, 8192 * 8193 // 2)
  assert step.secs == step.flops / H100.bf16_flops + H100.step_overhead_secs


def test_serial_seconds_add_attention_to_the_products():
  args = dict(num_tokens=512, num_sampled=512, kv_read_tokens=512 * 512, attn_pairs=512 * 512)
  step, wider = (cost.step_cost(LLAMA_8B, H100, **(args | change))
                 for change in ({}, dict(num_tokens=640)))
  products = 2 * (512 * (LLAMA_8B.num_params - 2 * 4096 * 128_256) + 512 * 4096 * 128_256)
  kv_bytes = (512 * 512 + 512) * LLAMA_8B.kv_bytes_per_token(1)
  assert step.serial_secs == pytest.approx(
      products / H100.bf16_flops + kv_bytes / H100.hbm_bytes_per_sec + H100.step_overhead_secs)
  assert step.secs < step.serial_secs <= 2 * step.secs
  # The floor of a step that reads much KV hides padded rows; its products do not.
  assert wider.serial_secs - step.serial_secs > 10 * (wider.secs - step.secs)


def test_each_term_by_finite_difference():
  def step(**changes):
    arguments = dict(num_tokens=100, num_sampled=10, kv_read_tokens=1000, attn_pairs=5000)
    return cost.step_cost(LLAMA_8B, H100, **(arguments | changes))
  base = step()
  layer_params = LLAMA_8B.num_params - 2 * 4096 * 128_256
  token = step(num_tokens=101)
  assert token.flops - base.flops == 2 * layer_params
  assert token.hbm_bytes - base.hbm_bytes == 2 * 4096 + LLAMA_8B.kv_bytes_per_token(1)
  assert step(num_sampled=11).flops - base.flops == 2 * 4096 * 128_256
  assert base.hbm_bytes - step(num_sampled=0).hbm_bytes == 2 * 4096 * 128_256
  assert step(kv_read_tokens=1001).hbm_bytes - base.hbm_bytes == LLAMA_8B.kv_bytes_per_token(1)
  assert step(attn_pairs=5001).flops - base.flops == 4 * 32 * 128 * 32


def test_tied_embeddings_do_not_change_the_work():
  tied = dataclasses.replace(LLAMA_8B, tie_embeddings=True)
  assert cost.step_cost(tied, H100, 64, 64, 9, 9) == cost.step_cost(LLAMA_8B, H100, 64, 64, 9, 9)


def test_float32_doubles_bytes_and_takes_the_float32_peak():
  wide = cost.step_cost(dataclasses.replace(LLAMA_8B, dtype="float32"), H100, 8192, 8, 50, 50)
  narrow = cost.step_cost(LLAMA_8B, H100, 8192, 8, 50, 50)
  assert wide.hbm_bytes == 2 * narrow.hbm_bytes
  assert wide.secs == wide.flops / H100.f32_flops + H100.step_overhead_secs


@pytest.mark.parametrize("name, ridge", [("v5e", 240), ("v5p", 166), ("v6e", 560), ("h100", 295)])
def test_ridges_of_the_chips(name, ridge):
  chip = cost.CHIPS[name]
  assert chip.name == name
  assert chip.bf16_flops / chip.hbm_bytes_per_sec == pytest.approx(ridge, rel=0.01)


def test_all_chips_are_listed_and_the_table_is_read_only():
  assert set(cost.CHIPS) == {"cpu", "a100", "h100", "h200", "l4", "t4", "v5e", "v5p", "v6e", "tpu7x"}
  with pytest.raises(TypeError):
    cost.CHIPS["h100"] = H100


def test_plan_totals():
  prompts = [np.array(p, np.int32) for p in ([1, 2, 3], [1, 2, 4], [1, 5], [6])]
  rows = np.array([2, 1, 1, 1], np.int32)
  full = build_prefix_tree(prompts, rows)
  planned = choose_nodes(full, np.array([3, 3, 2, 1], np.int32), rows, 1, 0.0)
  totals = cost.plan_totals(full, planned, rows, np.array([20, 10, 5, 5]))
  # One level: either [1] is shared above three requests (which leaves no level for the samples of
  # the first), or the samples share [1, 2, 3] and all else is alone.
  assert totals == cost.PlanTotals(12, 9, 6, 40)
  assert totals.prompt_tokens_saved == 0.25
