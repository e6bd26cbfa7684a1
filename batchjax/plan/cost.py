"""A roofline of one step, and what a plan computes against what was asked."""

import dataclasses
from types import MappingProxyType

from jaxtyping import Int
from jaxtyping import Num
import numpy as np

from batchjax.config import ModelConfig
from batchjax.plan.prefix_tree import PrefixTree


@dataclasses.dataclass(frozen=True)
class Chip:
  """Peak rates of one chip; steps reach a part of them.

  Attributes:
    name: key in `CHIPS`.
    bf16_flops: dense bfloat16 (and float16) matrix operations per second.
    f32_flops: the same with float32 results that are good to float32.
    hbm_bytes_per_sec: bandwidth of the device memory.
    hbm_bytes: its capacity.
    step_overhead_secs: an assumed fixed cost of a step: its dispatch and the
      launch of its kernels.
    lanes: arrays whose last axis is a multiple of this are stored as they are; TPUs fill others
      up, or put another axis there.
  """

  name: str
  bf16_flops: float
  f32_flops: float
  hbm_bytes_per_sec: float
  hbm_bytes: int
  step_overhead_secs: float
  lanes: int = 1


# Peaks are those of the vendors' data sheets (NVIDIA A100 80GB SXM, H100 and H200 SXM,
# L4 and T4, whose 16-bit type is float16; Google Cloud's
# pages of each TPU version), a whole chip each; a tpu7x chip is two JAX devices. TPUs publish no
# float32 rate: a float32 product takes six bfloat16 passes, so it is a sixth. The CPU is an
# assumption: two cores of a server, AVX2, where bfloat16 gains nothing.
CHIPS = MappingProxyType({chip.name: chip for chip in (
    Chip("cpu", 1.5e11, 1.5e11, 2e10, 8 << 30, 5e-4),
    Chip("a100", 312e12, 19.5e12, 2039e9, 80 * 10**9, 1e-4),
    Chip("h100", 989e12, 67e12, 3350e9, 80 * 10**9, 1e-4),
    Chip("h200", 989e12, 67e12, 4800e9, 141 * 10**9, 1e-4),
    Chip("l4", 121e12, 30e12, 300e9, 24 * 10**9, 1e-4),
    Chip("t4", 65e12, 8e12, 320e9, 16 * 10**9, 1e-4),
    Chip("v5e", 197e12, 197e12 / 6, 819e9, 16 << 30, 1e-4, 128),
    Chip("v5p", 459e12, 459e12 / 6, 2765e9, 95 << 30, 1e-4, 128),
    Chip("v6e", 918e12, 918e12 / 6, 1638e9, 32 << 30, 1e-4, 128),
    Chip("tpu7x", 2307e12, 2307e12 / 6, 7380e9, 192 << 30, 1e-4, 128),
)})


@dataclasses.dataclass(frozen=True)
class StepCost:
  """What one step costs.

  Attributes:
    flops, hbm_bytes: operations, and bytes of device memory moved.
    secs: a floor: products and attention overlap as if they were one kernel.
    serial_secs: the same with attention after the products, as the layers of a step run them. While
      attention reads KV, no padding is free.
  """

  flops: float
  hbm_bytes: float
  secs: float
  serial_secs: float


def step_cost(model: ModelConfig, chip: Chip, num_tokens: int, num_sampled: int,
              kv_read_tokens: int, attn_pairs: int) -> StepCost:
  """The roofline of one step on one chip.

    flops     = 2 * num_tokens * P_layers + 2 * num_sampled * D * V
                + 4 * attn_pairs * Q * H * L
    hbm_bytes = itemsize * (P_layers + num_tokens * D) + [num_sampled > 0] * itemsize * D * V
                + kv_bytes_per_token(lanes) * (kv_read_tokens + num_tokens)
    secs      = max(flops / peak, hbm_bytes / bandwidth) + step_overhead_secs

  and `serial_secs` the sum of two such maxima: one of the terms of attention (attn_pairs, KV), one
  of all others.

  P_layers are the parameters of all layers, each read once per step; D * V is
  the unembedding. Activations are taken to stay on the chip. It is a floor: no
  measured step is faster.

  Args:
    model: the model's shapes.
    chip: where it runs.
    num_tokens: tokens on the flat axis, padding included.
    num_sampled: rows whose logits are computed.
    kv_read_tokens: KV tokens that attention reads; a shared node counts once.
    attn_pairs: (query token, KV token) pairs of one layer, all heads taken as one.
  """
  itemsize = 4 if model.dtype == "float32" else 2
  peak = chip.f32_flops if model.dtype == "float32" else chip.bf16_flops
  unembedding = model.hidden_size * model.vocab_size
  layer_params = model.num_params - unembedding * (1 if model.tie_embeddings else 2)
  flops = 2 * num_tokens * layer_params + 2 * num_sampled * unembedding
  hbm_bytes = (itemsize * (layer_params + num_tokens * model.hidden_size)
               + (itemsize * unembedding if num_sampled else 0))
  attn_flops = 4 * attn_pairs * model.num_heads * model.head_dim * model.num_layers
  attn_bytes = model.kv_bytes_per_token(chip.lanes) * (kv_read_tokens + num_tokens)
  secs = lambda flops, hbm_bytes: max(flops / peak, hbm_bytes / chip.hbm_bytes_per_sec)
  total = float(flops + attn_flops), float(hbm_bytes + attn_bytes)
  return StepCost(
      *total, secs=secs(*total) + chip.step_overhead_secs,
      serial_secs=secs(flops, hbm_bytes) + secs(attn_flops, attn_bytes) + chip.step_overhead_secs)


@dataclasses.dataclass(frozen=True)
class PlanTotals:
  """Tokens of a planned window.

  Attributes:
    prompt_tokens_asked: every prompt once per sample: what an engine without
      any sharing computes.
    prompt_tokens_planned: what this plan computes.
    prompt_tokens_optimal: what is left when every shared prefix is computed
      once, at any number of levels.
    decode_tokens: tokens to generate, at most or as expected.
  """

  prompt_tokens_asked: int
  prompt_tokens_planned: int
  prompt_tokens_optimal: int
  decode_tokens: int

  @property
  def prompt_tokens_saved(self) -> float:
    """Part of the prompt tokens asked for that the plan does not compute."""
    return 1 - self.prompt_tokens_planned / max(self.prompt_tokens_asked, 1)


def plan_totals(full_tree: PrefixTree, planned_tree: PrefixTree,
                rows_per_request: Int[np.ndarray, "requests"],
                decode_lens: Num[np.ndarray, "requests"]) -> PlanTotals:
  """Adds up a plan.

  Args:
    full_tree: every shared prefix, as `build_prefix_tree` makes it.
    planned_tree: the nodes that were kept, of the same requests.
    rows_per_request: samples of each request.
    decode_lens: tokens that each request generates, all its samples together.
  """
  prompt_lens = full_tree.end[full_tree.node_of_request].astype(np.int64)
  return PlanTotals(
      prompt_tokens_asked=int((prompt_lens * rows_per_request).sum()),
      prompt_tokens_planned=int(planned_tree.length.sum(dtype=np.int64)),
      prompt_tokens_optimal=int(full_tree.length.sum(dtype=np.int64)),
      decode_tokens=int(decode_lens.sum()),
  )
