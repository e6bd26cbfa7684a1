"""Orbax checkpoints: bit-exact round trips, casts on restore, and what is refused."""

import dataclasses
import json
import pathlib

import jax
import numpy as np
import pytest

from batchjax import models, weights
from batchjax.config import ConfigError, ModelSource
from batchjax.weights.orbax import max_read_gb

GOLDENS = pathlib.Path(__file__).parents[1] / "goldens"


def golden(family="llama", dtype="bfloat16"):
  return weights.load_model(ModelSource(str(GOLDENS / family), dtype=dtype))


def assert_equal(a, b):
  assert jax.tree.structure(a) == jax.tree.structure(b)
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)):
    assert x.dtype == y.dtype
    np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3"])
def test_round_trip_is_bit_exact(family, dtype, tmp_path):
  model = golden(family, dtype)
  weights.save_orbax(str(tmp_path / "m"), model)
  source = ModelSource(str(tmp_path / "m"), dtype=dtype)
  assert weights.source_format(source) == "orbax"
  again = weights.load_model(source)
  assert again.config == weights.load_config(source) == model.config
  assert weights.stored_dtype(source) == dtype
  assert_equal(again.params, model.params)


def test_restores_straight_into_the_wanted_dtype(tmp_path):
  model = golden(dtype="float32")
  weights.save_orbax(str(tmp_path / "m"), model)
  again = weights.load_model(ModelSource(str(tmp_path / "m"), dtype="bfloat16"))
  assert again.config == dataclasses.replace(model.config, dtype="bfloat16")
  assert_equal(again.params, jax.tree.map(lambda x: x.astype("bfloat16"), model.params))


def test_does_not_overwrite(tmp_path):
  weights.save_orbax(str(tmp_path / "m"), golden())
  with pytest.raises(ValueError, match="already exists"):
    weights.save_orbax(str(tmp_path / "m"), golden("qwen2"))
  assert_equal(weights.load_model(ModelSource(str(tmp_path / "m"), dtype="bfloat16")).params,
               golden().params)


@pytest.mark.parametrize("changes,message", [
    (dict(qk_norm=True), r"lacks the parameter layers_0/attn/q_norm/scale, expected shape \(16,\)"),
    (dict(ffn_size=96), r"gate_up has shape \(32, 96\), expected \(32, 192\)"),
    (dict(tie_embeddings=True), r"\['lm_head/kernel'\] are not parameters of this llama model"),
])
def test_faults_name_the_parameter_and_the_folder(changes, message, tmp_path):
  weights.save_orbax(str(tmp_path / "m"), golden())
  file = tmp_path / "m" / "model_config.json"
  file.write_text(json.dumps(json.loads(file.read_text()) | changes))
  with pytest.raises(weights.WeightError, match="m/params: .*" + message):
    weights.load_model(ModelSource(str(tmp_path / "m")))


def test_what_is_read_ahead_holds_the_largest_parameter_and_is_no_second_model():
  assert max_read_gb(models.SHAPES["smollm2_135m"]) == 1
  large = models.SHAPES["llama3_8b"]
  assert 4 * large.vocab_size * large.hidden_size / 1e9 < max_read_gb(large)
  assert max_read_gb(large) < 0.3 * 2 * large.num_params / 1e9


def test_a_config_of_another_version_is_named(tmp_path):
  weights.save_orbax(str(tmp_path / "m"), golden())
  file = tmp_path / "m" / "model_config.json"
  file.write_text(json.dumps(json.loads(file.read_text()) | {"num_experts": 8}))
  with pytest.raises(ConfigError, match=r"model_config\.json has unknown fields \['num_experts'\]"):
    weights.load_config(ModelSource(str(tmp_path / "m")))


def test_hugging_face_config_goes_along_only_where_there_is_one(tmp_path):
  weights.save_orbax(str(tmp_path / "m"), golden())
  with pytest.raises(ConfigError, match="has no config.json"):
    weights.load_hf_config(ModelSource(str(tmp_path / "m")))
  weights.save_orbax(str(tmp_path / "n"), golden(), {"model_type": "llama"})
  assert weights.load_hf_config(ModelSource(str(tmp_path / "n"))) == {
      "model_type": "llama", "torch_dtype": "bfloat16"}
