import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from batchjax import models
from batchjax.config import RopeScaling
from batchjax.models import layers


@pytest.mark.parametrize("plus_one", [False, True])
def test_rms_norm(plus_one):
  x = np.random.default_rng(0).normal(size=(5, 8)).astype(np.float32)
  scale = np.linspace(-1, 1, 8, dtype=np.float32)
  y = layers.RMSNorm(1e-6, plus_one, "float32").apply({"params": {"scale": scale}}, jnp.asarray(x))
  expected = x / np.sqrt((x ** 2).mean(-1, keepdims=True) + 1e-6) * (scale + plus_one)
  np.testing.assert_allclose(y, expected, rtol=1e-5)


def test_rms_norm_casts_where_the_family_does():
  x = jnp.asarray([[1.0, 3.0, 0.3, 0.7]], jnp.bfloat16)
  scale = jnp.asarray([0.11, 0.23, 0.37, 0.51], jnp.bfloat16)
  unit = x.astype(jnp.float32)
  unit = unit / jnp.sqrt(jnp.mean(unit ** 2) + 1e-6)
  apply = lambda plus_one: layers.RMSNorm(1e-6, plus_one, "bfloat16").apply(
      {"params": {"scale": scale}}, x)
  np.testing.assert_array_equal(apply(False), unit.astype(jnp.bfloat16) * scale)
  np.testing.assert_array_equal(
      apply(True), (unit * (1 + scale.astype(jnp.float32))).astype(jnp.bfloat16))


def test_rope_scaling():
  plain = layers.rope_frequencies(64, 10_000.0)
  assert plain.shape == (32,) and plain[0] == 1.0
  linear = layers.rope_frequencies(64, 10_000.0, RopeScaling("linear", 8.0))
  np.testing.assert_allclose(linear, plain / 8, rtol=1e-6)

  scaling = RopeScaling("llama3", 8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                        original_max_len=1024)
  ratio = layers.rope_frequencies(64, 10_000.0, scaling) / plain
  wavelen = 2 * math.pi / plain
  np.testing.assert_allclose(ratio[wavelen < 1024 / 4], 1.0, rtol=1e-6)
  np.testing.assert_allclose(ratio[wavelen > 1024], 1 / 8, rtol=1e-6)
  between = (wavelen > 1024 / 4) & (wavelen < 1024)
  assert between.any() and ((ratio[between] > 1 / 8) & (ratio[between] < 1)).all()
  assert (np.diff(ratio) <= 1e-7).all()


def test_rope_table_of_each_kind():
  config = models.SHAPES["tiny_gemma3"]  # base 1e6 scaled by 8 globally, 1e4 locally
  positions = jnp.arange(5)
  tables = {kind: layers.rope_table(config, kind, positions) for kind in ("local", "global")}
  exponents = -np.arange(0, 8, 2) / 8
  np.testing.assert_allclose(tables["local"][0], np.cos(np.outer(range(5), 1e4 ** exponents)),
                             atol=1e-6)
  np.testing.assert_allclose(tables["global"][1], np.sin(np.outer(range(5), 1e6 ** exponents / 8)),
                             atol=1e-6)
  one_base = dataclasses.replace(config, rope_local_theta=None)
  np.testing.assert_array_equal(layers.rope_table(one_base, "local", positions)[0],
                                layers.rope_table(one_base, "global", positions)[0])


def test_rotate_turns_pairs_and_keeps_relative_positions():
  config = models.SHAPES["tiny_llama"]
  positions = jnp.asarray([0, 3, 10, 13])
  cos, sin = layers.rope_table(config, "global", positions)
  q, k = np.random.default_rng(0).normal(size=(2, 8)).astype(np.float32)
  turned_q = layers.rotate(jnp.broadcast_to(q, (4, 2, 8)), cos, sin)
  turned_k = layers.rotate(jnp.broadcast_to(k, (4, 8)), cos, sin)
  np.testing.assert_array_equal(turned_q[0, 0], q)
  pairs = (q[:4] + 1j * q[4:]) * np.exp(1j * 3 * 10_000.0 ** (-np.arange(0, 8, 2) / 8))
  np.testing.assert_allclose(turned_q[1, 1], np.concatenate([pairs.real, pairs.imag]), atol=1e-5)
  np.testing.assert_allclose(turned_q[1, 0] @ turned_k[0], turned_q[3, 0] @ turned_k[2], atol=1e-5)


def test_padding_reads_the_first_row_of_the_table():
  config = models.SHAPES["tiny_llama"]
  table = np.random.default_rng(0).normal(size=(256, 32)).astype(np.float32)
  embed = layers.VocabTable(config, "embedding")
  rows = embed.apply({"params": {"embedding": table}}, jnp.asarray([-1, 5]), method="lookup")
  np.testing.assert_array_equal(rows, table[[0, 5]])


def test_low_precision_logits_are_summed_in_float32():
  config = dataclasses.replace(models.SHAPES["tiny_llama"], dtype="bfloat16")
  table = jax.random.normal(jax.random.key(0), (256, 32), jnp.bfloat16)
  hidden = jax.random.normal(jax.random.key(1), (3, 32), jnp.bfloat16)
  logits = layers.VocabTable(config, "kernel").apply(
      {"params": {"kernel": table}}, hidden, method="logits")
  assert logits.dtype == jnp.float32
  np.testing.assert_allclose(logits, hidden.astype(np.float32) @ table.T.astype(np.float32),
                             atol=1e-4)
