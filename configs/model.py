"""Any model, with the default of every setting.

    batchjax run --config=model:path/to/model --input=requests.jsonl --output=completions.jsonl

The path is that of a Hugging Face folder, a .gguf file or an Orbax checkpoint. Accelerators want
--config.model.dtype=bfloat16 and more rows: --config.engine.max_rows=1024
--config.engine.max_step_tokens=8192 --config.engine.page_size=64.
"""

from batchjax.config import JobConfig, ModelSource, to_config_dict


def get_config(path: str = ""):
  return to_config_dict(JobConfig(model=ModelSource(path=path)))
