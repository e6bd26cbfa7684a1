"""Every test runs on the CPU; a TPU compiler that is installed must not look for a TPU."""

import atexit
import json
import os
import pathlib
import shutil
import tempfile

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors

CHAT_TEMPLATE = ("{% for m in messages %}<|{{ m.role }}|>{{ m.content }}</s>{% endfor %}"
                 "{% if add_generation_prompt %}<|assistant|>{% endif %}")

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
# Meshes are of simulated devices; all else runs on the first.
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")
# Threads of an interpreted kernel wait for one another in callbacks, each of which holds a thread of
# XLA's pool; that pool has as many as there are cores.
os.environ.setdefault("NPROC", "16")
# Compiled steps are kept below the home folder: one of this run's own, which its processes share.
os.environ.setdefault("MPLCONFIGDIR", str(pathlib.Path.home() / ".config" / "matplotlib"))
_IS_WORKER = "PYTEST_XDIST_WORKER" in os.environ
_HOME = pathlib.Path(tempfile.gettempdir()) / (
    f"batchjax-tests-{os.getppid() if _IS_WORKER else os.getpid()}")
_HOME.mkdir(mode=0o700, exist_ok=True)
if not _IS_WORKER:
  atexit.register(shutil.rmtree, _HOME, ignore_errors=True)
os.environ["HOME"] = str(_HOME)


def pytest_collection_modifyitems(items):
  """The folders of the longest tests come first: at the end the workers share out what is short."""
  folder = lambda item: item.path.parent.name
  items.sort(key=lambda item: ("e2e", "kernels", folder(item)).index(folder(item)))


def _quickly():
  import jax  # reads the environment above
  jax.config.update("jax_disable_most_optimizations", True)
  yield
  jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture
def quick_compiler():
  """XLA spends no time on fast code, where compiling takes seconds and running milliseconds."""
  yield from _quickly()


@pytest.fixture(scope="module")
def quick_compiler_of_module():
  """The same for a whole module, its fixtures included."""
  yield from _quickly()


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> pathlib.Path:
  """A Hugging Face folder: random weights, a byte-level tokenizer, a chat template."""
  folder = tmp_path_factory.mktemp("tiny") / "model"
  golden = pathlib.Path(__file__).parent / "goldens/llama"
  shutil.copytree(golden, folder, ignore=shutil.ignore_patterns("*.npz"))
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
