"""Llama-3-8B with random weights, bfloat16, for one GPU of 80 GB or more.

    batchjax bench --config=llama3_8b --workload=prefix_groups \
        --num_requests=1024 --prefix_len=2000 --share_degree=16 --distinct_len=200 \
        --output_len=100 --measure_ceilings

prints one line of JSON. Weights take 15 GiB, the KV pool (128 KiB a token) what the largest
step leaves of the rest.
"""

from batchjax.config import EngineConfig, JobConfig, ModelSource, to_config_dict
from batchjax.types import SamplingParams


def get_config():
  return to_config_dict(JobConfig(
      model=ModelSource(format="random", shape="llama3_8b", dtype="bfloat16"),
      # Shapes compile side by side, so that one more adds little, once.
      engine=EngineConfig(max_rows=1024, max_step_tokens=8192, page_size=64, compile_secs=0.5,
                          first_compile_secs=12.0),
      sampling=SamplingParams(temperature=0.0)))
