"""Configurations: from dataclasses to flags and back, with errors that name the field."""

import dataclasses

import pytest

from batchjax.config import (ConfigError, EngineConfig, JobConfig, ModelConfig, ModelSource,
                             from_config_dict, to_config_dict)
from batchjax.types import SamplingParams

JOB = JobConfig(model=ModelSource(path="m.gguf"), sampling=SamplingParams(stop=("Q:",)))


def changed(**values):
  config = to_config_dict(JOB)
  for name, value in values.items():
    owner, _, field = name.rpartition("__")
    (config[owner] if owner else config)[field] = value
  return config.to_dict()


def test_round_trip():
  assert from_config_dict(JobConfig, to_config_dict(JOB).to_dict()) == JOB
  config = changed(engine__max_rows=3, engine__attention="reference", sampling__temperature=1)
  job = from_config_dict(JobConfig, config)
  assert (job.engine.max_rows, job.engine.attention, job.sampling.temperature) == (
      3, "reference", 1.0)


def test_a_field_that_is_none_can_be_set_and_keeps_its_type():
  config = to_config_dict(JOB)
  assert config.engine.attention is None
  config.engine.attention = "reference"
  with pytest.raises(TypeError):
    config.engine.attention = 3


@pytest.mark.parametrize("values,message", [
    (dict(engine__max_rows="8"), r"config\.engine\.max_rows must be int, got '8'"),
    (dict(engine__max_rows=True), r"config\.engine\.max_rows must be int, got True"),
    (dict(engine__max_rows=0), r"engine\.max_rows must be positive, got 0"),
    (dict(engine__page_size=24), r"engine\.page_size=24 must be a power of two"),
    (dict(engine__max_step_tokens=8), r"engine\.max_step_tokens=8 must be at least max_rows=64"),
    (dict(engine__mesh=dict(tensor=-1)), r"engine\.mesh\.tensor must be at least 0, got -1"),
    (dict(engine__kv_memory_bytes=-1), r"engine\.kv_memory_bytes must be at least 0, got -1"),
    (dict(limits__max_n=0), r"limits\.max_n must be positive, got 0"),
    (dict(limits__max_template_secs=-1), r"limits\.max_template_secs must be positive, got -1"),
    (dict(sampling__temperature=-1.0), r"config\.sampling\.temperature must be at least 0"),
    (dict(sampling__temperature=float("nan")), r"config\.sampling\.temperature must be finite"),
    (dict(sampling__temperature=10**400), r"config\.sampling\.temperature must be finite"),
    (dict(model__format="pickle"), r"config\.model\.format must be one of .*'gguf'.*'pickle'"),
    (dict(model__path=""), r"model\.path is empty: name a Hugging Face folder"),
    (dict(sampling__stop="Q:"), r"config\.sampling\.stop must be a list, got 'Q:'"),
    (dict(sampling__stop=(3,)), r"config\.sampling\.stop\[0\] must be str, got 3"),
    (dict(strict=None), r"config\.strict may not be None|config\.strict must be bool"),
])
def test_bad_values_are_named(values, message):
  config = dataclasses.asdict(JOB)
  for name, value in values.items():
    owner, _, field = name.rpartition("__")
    (config[owner] if owner else config)[field] = value
  with pytest.raises(ConfigError, match=message):
    from_config_dict(JobConfig, config)


def test_unknown_and_missing_fields_are_named():
  config = dataclasses.asdict(JOB)
  config["engine"]["max_row"] = 3
  with pytest.raises(ConfigError, match=r"config\.engine has unknown fields \['max_row'\]; known"):
    from_config_dict(JobConfig, config)
  with pytest.raises(ConfigError, match=r"config lacks \['model'\]"):
    from_config_dict(JobConfig, {})


def test_model_shapes_are_checked():
  shape = dict(family="llama", vocab_size=8, hidden_size=8, ffn_size=8, num_layers=2, num_heads=4,
               num_kv_heads=2, head_dim=4, max_len=16)
  config = ModelConfig(**shape)
  assert config.layer_kinds == ("global", "global")
  assert config.kv_bytes_per_token(1) == 2 * 2 * 2 * 4 * 4
  assert config.kv_width(128) == 128 and config.kv_bytes_per_token(128) == 2 * 2 * 128 * 4
  assert [dataclasses.replace(config, head_dim=h).kv_width(128) for h in (64, 80, 96, 256)] == [
      128, 256, 256, 512]
  for values, message in ((dict(num_kv_heads=3), "not a multiple"), (dict(head_dim=0), "head_dim"),
                          (dict(layer_kinds=("local", "global")), "sliding_window"),
                          (dict(layer_kinds=("global",)), "layer_kinds")):
    with pytest.raises(ConfigError, match=message):
      ModelConfig(**{**shape, **values})
  assert dataclasses.replace(config, layer_kinds=(), num_layers=3).num_params > config.num_params
  with pytest.raises(dataclasses.FrozenInstanceError):
    EngineConfig().max_rows = 3
