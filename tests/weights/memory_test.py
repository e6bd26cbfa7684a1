"""Peak host memory of loading, in a process of its own: a device on the CPU is host memory too."""

import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from batchjax import models, weights
from batchjax.weights.tree import nest

HF_CONFIG = dict(
    model_type="llama", hidden_size=512, intermediate_size=1536, num_hidden_layers=16,
    num_attention_heads=8, num_key_value_heads=4, head_dim=64, vocab_size=4096,
    max_position_embeddings=1024, rms_norm_eps=1e-5, bos_token_id=1, eos_token_id=2)
LOAD = """
import pathlib, sys
import jax
from batchjax import weights
from batchjax.config import ModelSource
def peak():
  # Not ru_maxrss: a process starts with that of the one that forked it.
  lines = pathlib.Path("/proc/self/status").read_text().splitlines()
  return 1024 * int(next(line.split()[1] for line in lines if line.startswith("VmHWM")))
weights.load_model(ModelSource(sys.argv[2]))
before = peak()
model = weights.load_model(ModelSource(sys.argv[1]))
print(peak() - before, sum(leaf.nbytes for leaf in jax.tree.leaves(model.params)))
"""


def save(path, hf_config):
  config = models.config_from_hf(hf_config)
  params = nest({name: np.ones(shape, np.float32)
                 for name, shape in weights.param_shapes(config).items()})
  weights.save_hf(str(path), weights.Model(config, params), hf_config, max_shard_bytes=100 << 20)


@pytest.mark.skipif(not pathlib.Path("/proc/self/status").exists(),
                    reason="reads the peak from /proc, which only Linux has")
def test_peak_is_below_1_3_of_the_model(tmp_path):
  # A tiny model first, so that what the libraries load once does not count.
  tiny = dict(hidden_size=32, num_hidden_layers=1, vocab_size=64, intermediate_size=32)
  save(tmp_path / "tiny", HF_CONFIG | tiny)
  save(tmp_path / "model", HF_CONFIG)
  result = subprocess.run(
      [sys.executable, "-c", LOAD, str(tmp_path / "model"), str(tmp_path / "tiny")],
      env=os.environ | {"JAX_PLATFORMS": "cpu"}, cwd=pathlib.Path(__file__).parents[2],
      capture_output=True, text=True, check=True)
  peak_bytes, model_bytes = map(int, result.stdout.split())
  assert model_bytes > 200e6
  assert model_bytes * 0.8 < peak_bytes < model_bytes * 1.3
