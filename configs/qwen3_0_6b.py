"""Qwen3-0.6B with random weights, bfloat16, for one GPU of 80 GB or more.

    batchjax bench --config=qwen3_0_6b --workload=multi_level \
        --num_documents=64 --questions_per_document=16 --measure_ceilings

prints one line of JSON. Weights take 1.1 GiB, the KV pool (112 KiB a token) what the largest step
leaves of the rest.
"""

from batchjax.config import EngineConfig, JobConfig, ModelSource, to_config_dict
from batchjax.types import SamplingParams


def get_config():
  return to_config_dict(JobConfig(
      model=ModelSource(format="random", shape="qwen3_0_6b", dtype="bfloat16"),
      engine=EngineConfig(max_rows=1024, max_step_tokens=8192, page_size=64),
      sampling=SamplingParams(temperature=0.0)))
