"""Llama-3.2-1B with random weights, bfloat16, for one GPU of 80 GB or more.

    batchjax bench --config=llama3_2_1b --workload=samples \
        --num_prompts=128 --prompt_len=900 --num_samples=64 --output_len=256 --measure_ceilings

prints one line of JSON. Weights take 2.3 GiB, the KV pool (32 KiB a token) what the largest step
leaves of the rest.
"""

from batchjax.config import EngineConfig, JobConfig, ModelSource, to_config_dict
from batchjax.types import SamplingParams


def get_config():
  return to_config_dict(JobConfig(
      model=ModelSource(format="random", shape="llama3_2_1b", dtype="bfloat16"),
      # Shapes compile side by side, so that one more adds little, once.
      engine=EngineConfig(max_rows=1024, max_step_tokens=8192, page_size=64, compile_secs=0.5,
                          first_compile_secs=12.0),
      sampling=SamplingParams(temperature=0.0)))
