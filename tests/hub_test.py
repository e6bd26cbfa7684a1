"""Models by their name on the Hub: what the cache answers, what is fetched, and what is said."""

import pathlib
import shutil
import sys

from huggingface_hub import constants
import jax
import numpy as np
import pytest

from batchjax import hub
from batchjax.config import ConfigError, ModelSource
from batchjax.text.tokenizer import load_tokenizer
from batchjax.weights import load_config, load_model, source_format
from tests import fake_hub

LLAMA = pathlib.Path(__file__).parent / "goldens/llama"
A, B = "a" * 40, "b" * 40
ABSENT = "http://127.0.0.1:1"  # nothing listens there


def set_endpoint(monkeypatch, address):
  monkeypatch.setattr(constants, "ENDPOINT", address)
  monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE",
                      address + "/{repo_id}/resolve/{revision}/{filename}")


@pytest.fixture
def model(tmp_path):
  return fake_hub.write_model(tmp_path / "model", LLAMA)


@pytest.fixture
def cache(tmp_path, monkeypatch):
  """An empty cache, and no network."""
  monkeypatch.chdir(tmp_path)
  monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
  set_endpoint(monkeypatch, ABSENT)
  return tmp_path / "cache"


@pytest.fixture
def server(cache, monkeypatch):
  with fake_hub.serve() as (server, address):
    set_endpoint(monkeypatch, address)
    yield server


def pinned(path, **kwargs):
  return hub.pin(ModelSource(path), **kwargs).path


def test_a_cached_model_is_found_without_network(cache, model):
  snapshot = fake_hub.add_to_cache(cache, "org/tiny", A, model)
  for name in ("org/tiny", "hf://org/tiny", "org/tiny@main", f"org/tiny@{A}"):
    assert hub.local_path(name) == snapshot and pinned(name) == f"org/tiny@{A}"
  source = ModelSource("org/tiny")
  assert source_format(source) == "hf" and load_config(source).eos_token_ids[-1] == 1
  jax.tree.map(np.testing.assert_array_equal, load_model(source).params,
               load_model(ModelSource(str(model))).params)
  assert load_tokenizer("org/tiny").encode("ab") == load_tokenizer(model).encode("ab")


def test_a_name_means_the_commit_it_was_pinned_to(cache, model):
  fake_hub.add_to_cache(cache, "org/tiny", A, model)
  asked = ModelSource("org/tiny", tokenizer="org/tiny")
  first = hub.pin(asked)
  assert hub.pins(asked, first) == {"org/tiny": f"org/tiny@{A}"}
  fake_hub.add_to_cache(cache, "org/tiny", B, model)
  assert pinned("org/tiny") == f"org/tiny@{B}"
  assert hub.pin(asked, hub.pins(asked, first)) == first
  assert hub.pin(first) == first and hub.pins(first, first) == {}
  assert hub.title(first.path) == "org/tiny@aaaaaaa" and hub.title("/a/b.gguf") == "b.gguf"


def test_only_what_is_read_is_fetched_and_then_nothing(server, model, cache):
  for name in ("pytorch_model.bin", "consolidated.safetensors", "x.gguf", "onnx/config.json",
               "original/params.json"):
    (model / name).parent.mkdir(exist_ok=True)
    (model / name).write_bytes(b"large")
  (model / "additional_chat_templates").mkdir()
  (model / "additional_chat_templates/rag.jinja").write_text("{{ messages }}")
  server.repos["org/tiny"] = [(A, model)]

  def held():
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}

  folder = hub.local_path("org/tiny", "config")
  texts = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
           "additional_chat_templates/rag.jinja"}
  assert held() == texts and folder.name == A
  assert hub.local_path("org/tiny") == folder and held() == texts | {"model.safetensors"}
  assert set(hub.files("org/tiny", "weights")) == held()
  assert set(hub.files("org/tiny", "tokenizer")) == texts
  (folder / "beside.bin").write_bytes(b"of another program")
  assert "beside.bin" not in hub.files("org/tiny", "weights")

  server.repos["org/tiny"].append((B, model))
  server.requests.clear()
  hub.local_path("org/tiny"), hub.local_path(f"org/tiny@{A}"), pinned("org/tiny")
  assert server.requests == []  # the cache comes first
  assert hub.local_path(f"org/tiny@{B}").name == B


def test_shards_are_those_of_the_index(server, model, cache):
  (model / "model.safetensors").rename(model / "part-1.safetensors")
  (model / "other.safetensors").write_bytes(b"not named")
  tensors = load_names(model / "part-1.safetensors")
  (model / "model.safetensors.index.json").write_text(
      '{"weight_map": {%s}}' % ", ".join(f'"{name}": "part-1.safetensors"' for name in tensors))
  server.repos["org/tiny"] = [(A, model)]
  folder = hub.local_path("org/tiny")
  assert {path.name for path in folder.glob("*.safetensors")} == {"part-1.safetensors"}
  load_model(ModelSource("org/tiny"))


def load_names(path):
  import safetensors
  with safetensors.safe_open(path, "np") as file:
    return list(file.keys())


def test_a_folder_that_lacks_files_is_completed(server, model, cache):
  server.repos["org/tiny"] = [(A, model)]
  (model.parent / "part").mkdir()
  shutil.copy(model / "config.json", model.parent / "part")
  fake_hub.add_to_cache(cache, "org/tiny", A, model.parent / "part")
  assert (hub.local_path("org/tiny", "config") / "generation_config.json").exists()


def test_a_gguf_file_is_named_behind_its_repository(server, model, cache):
  (model / "q").mkdir()
  (model / "q/tiny.gguf").write_bytes(b"GGUF")
  (model / "other.gguf").write_bytes(b"GGUF")
  server.repos["org/tiny"] = [(A, model)]
  path = hub.local_path("org/tiny/q/tiny.gguf")
  assert path.read_bytes() == b"GGUF" and path.parts[-3:] == (A, "q", "tiny.gguf")
  assert len(list(path.parents[1].rglob("*.*"))) == 1
  assert pinned("org/tiny/q/tiny.gguf") == pinned("org/tiny@main/q/tiny.gguf") == (
      f"org/tiny@{A}/q/tiny.gguf")
  assert source_format(ModelSource(f"org/tiny@{A}/q/tiny.gguf")) == "gguf"
  assert hub.files("org/tiny/q/tiny.gguf", "weights") == {"tiny.gguf": path}
  with pytest.raises(ConfigError, match=r"no 7\.gguf at revision main: name one of its GGUF files, as "
                                        r"org/tiny/(other|q/tiny)\.gguf; see http"):
    hub.local_path("org/tiny/7.gguf")


def test_what_exists_here_is_no_name(cache, model):
  (cache.parent / "org").mkdir()
  shutil.copytree(model, cache.parent / "org/tiny")
  assert hub.local_path("org/tiny") == pathlib.Path("org/tiny") and pinned("org/tiny") == "org/tiny"
  for path in ("", "tiny", "/org/tiny", "./org/tiny", "~/tiny", "a/b/c", "org/tokenizer.json",
               "org/x.gguf", "org/tiny@", "gs://org/tiny"):
    assert not hub.is_name(path) and pinned(path or ".") == (path or ".")


def one_line(call, *args, match):
  with pytest.raises(ConfigError, match=match) as error:
    call(*args)
  assert "\n" not in str(error.value)


@pytest.mark.parametrize("call", [
    lambda path: load_config(ModelSource(path)), lambda path: load_model(ModelSource(path)),
    lambda path: hub.pin(ModelSource(path)), lambda path: hub.pin(ModelSource(".", tokenizer=path)),
    load_tokenizer])
def test_every_reader_says_both_readings(server, call):
  one_line(call, "modles/llama", match="^modles/llama is no local path, and the Hub shows no repository "
           "at http.*/modles/llama: correct it; a private one needs a token")


def test_errors_name_what_to_do(server, model, cache, monkeypatch):
  server.repos |= {"org/tiny": [(A, model)], "org/gated": [(A, model)]}
  server.gated.add("org/gated")
  one_line(hub.local_path, "org/gated", match="org/gated is gated: ask for access at http.*/org/gated, and "
           "give your token .*HF_TOKEN")
  one_line(hub.local_path, "org/tiny@v9", match="org/tiny has no revision 'v9': name a branch")
  (model / "model.safetensors").rename(model / "pytorch_model.bin")
  one_line(hub.local_path, "org/tiny", match="org/tiny has no model.safetensors at revision main: name a "
           "repository with config.json and safetensors")
  (model / "config.json").unlink()
  (model / "tiny-Q4.gguf").write_bytes(b"GGUF")
  server.repos["org/tiny"] = [(B, model)]
  one_line(load_config, ModelSource(f"org/tiny@{B}"), match="org/tiny has no config.json at revision b+: "
           "name one of its GGUF files, as org/tiny/tiny-Q4.gguf; see http")
  one_line(hub.local_path, "gs://bucket/model", match="models are read from local paths and from the Hub")
  one_line(hub.local_path, "org/a--b", match="org/a--b is no local path, and no name of the Hub")


def test_without_network(cache, model, caplog):
  one_line(hub.local_path, "org/tiny", match=r"org/tiny is no local path, and the cache \(.*cache\) "
           r"lacks files of its revision main, and they cannot be fetched from http.* "
           r"\(ConnectError: .*\): mend that")
  snapshot = fake_hub.add_to_cache(cache, "org/tiny", A, model)
  (snapshot / "model.safetensors").unlink()
  (snapshot / "tokenizer_config.json").unlink()
  load_config(ModelSource("org/tiny"))
  assert "org/tiny@main: the Hub cannot be asked for more than the cache holds (ConnectError" in caplog.text
  one_line(hub.local_path, "org/tiny", match="org/tiny is no local path, and the cache .* lacks files")


def test_offline_asks_nobody(server, cache, model, monkeypatch):
  server.repos["org/tiny"] = [(A, model)]
  monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
  one_line(hub.local_path, "org/tiny", match="and HF_HUB_OFFLINE is set: unset it, or bring the files "
           "there with: hf download org/tiny")
  fake_hub.add_to_cache(cache, "org/tiny", A, model)
  hub.local_path("org/tiny")
  one_line(hub.local_path, f"org/tiny@{B}", match="lacks files of its revision b+, and HF_HUB_OFFLINE is set")
  assert server.requests == []


def test_a_download_that_breaks_off_is_one_line(server, cache, model, monkeypatch):
  server.repos["org/tiny"] = [(A, model)]
  answer = server.answer
  server.answer = lambda path: (400, {}, b"") if "resolve" in path else answer(path)
  one_line(hub.local_path, "org/tiny", match="they cannot be fetched from http.*: mend that "
           "and run the same command again")


def test_without_the_library(cache, model, monkeypatch):
  monkeypatch.setitem(sys.modules, "huggingface_hub", None)
  assert hub.local_path(str(model)) == model
  one_line(hub.local_path, "org/tiny", match="org/tiny is no local path, and names of the Hub need "
           r"huggingface_hub \(.*\): pip install 'batchjax\[hub\]', or correct the path")
