"""Files of tiny models with bytes flipped and values exchanged: they load, or one line says why not."""

import json
import pathlib
import shutil
import tempfile
import warnings

import gguf
import hypothesis
from hypothesis import strategies as st
import numpy as np
import pytest
import sentencepiece
import tokenizers

from batchjax import weights
from batchjax.config import ModelSource
from batchjax.text.tokenizer import load_tokenizer

GOLDENS = pathlib.Path(__file__).parents[1] / "goldens"
PIECES = (b"\xff", bytes(8), b"\xff" * 8, bytes(7) + b"\x80", b"1e999", b"-1", b"null", b'"', b"[[", b"}")
VALUES = (None, True, -1, 0, 2**31, 2**63, 10**400, 1.5, float("nan"), float("inf"), "", "x", "\ud800",
          [], {}, [1], ["x"], [[]], {"a": 1})


@st.composite
def damaged_bytes(draw, original: bytes):
  """A few bytes changed, most of them in the header; a piece written over; or the end cut off."""
  data = bytearray(original)
  place = st.integers(0, min(len(data), draw(st.sampled_from([512, 4096, 1 << 20]))) - 1)
  match draw(st.sampled_from(["flip", "flip", "write", "insert", "cut"])):
    case "flip":
      for i in draw(st.lists(place, min_size=1, max_size=3)):
        data[i] = draw(st.integers(0, 255))
    case "write":
      i, piece = draw(place), draw(st.sampled_from(PIECES))
      data[i:i + len(piece)] = piece
    case "insert":
      i = draw(place)
      data[i:i] = draw(st.sampled_from(PIECES))
    case "cut":
      del data[draw(place):]
  return bytes(data)


@st.composite
def damaged_json(draw, original: bytes):
  """A value somewhere in the tree exchanged or removed."""
  value = json.loads(original)
  node, key = {"": value}, ""
  while isinstance(node[key], dict | list) and node[key] and draw(st.integers(0, 3)):
    node = node[key]
    key = draw(st.sampled_from(list(node) if isinstance(node, dict) else range(min(len(node), 50))))
  if draw(st.integers(0, 4)) or node is value is None or key == "":
    node[key] = draw(st.sampled_from(VALUES))
  else:
    del node[key]
  return json.dumps(value).encode()


def write_gguf(path):
  hf = json.loads((GOLDENS / "llama" / "config.json").read_text())
  writer = gguf.GGUFWriter(path, "llama")
  writer.add_block_count(1)
  writer.add_context_length(64)
  writer.add_embedding_length(hf["hidden_size"])
  writer.add_feed_forward_length(8)
  writer.add_head_count(2)
  writer.add_head_count_kv(1)
  writer.add_layer_norm_rms_eps(1e-6)
  writer.add_rope_dimension_count(16)
  writer.add_tokenizer_model("llama")
  tokens = ["<unk>", "<s>", "</s>", "▁", "a", "b", "ab", "▁ab"]
  writer.add_token_list(tokens)
  writer.add_token_scores([float(-i) for i in range(8)])
  writer.add_token_types([2, 3, 3, 1, 1, 1, 1, 1])
  writer.add_bos_token_id(1)
  writer.add_eos_token_id(2)
  shapes = {"token_embd": (8, 32), "output_norm": (32,), "blk.0.attn_norm": (32,),
            "blk.0.attn_q": (32, 32), "blk.0.attn_k": (16, 32), "blk.0.attn_v": (16, 32),
            "blk.0.attn_output": (32, 32), "blk.0.ffn_norm": (32,), "blk.0.ffn_gate": (8, 32),
            "blk.0.ffn_up": (8, 32), "blk.0.ffn_down": (32, 8)}
  for name, shape in shapes.items():
    writer.add_tensor(f"{name}.weight", np.ones(shape, np.float32))
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> pathlib.Path:
  """A model of each format, and tokenizers of each."""
  folder = tmp_path_factory.mktemp("models")
  source = ModelSource(str(GOLDENS / "llama"), dtype="float16")
  weights.save_hf(str(folder / "hf"), weights.load_model(source), weights.load_hf_config(source), 40_000)
  weights.save_orbax(str(folder / "orbax"), weights.load_model(source))
  (folder / "gguf").mkdir()
  write_gguf(folder / "gguf" / "m.gguf")
  backend = tokenizers.Tokenizer(tokenizers.models.BPE(
      vocab={"<s>": 0, "</s>": 1, "a": 2, "b": 3, "ab": 4}, merges=[("a", "b")]))
  backend.add_special_tokens(["<s>", "</s>"])
  backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
  backend.decoder = tokenizers.decoders.ByteLevel()
  backend.save(str(folder / "hf" / "tokenizer.json"))
  (folder / "spm").mkdir()
  sentencepiece.SentencePieceTrainer.train(
      sentence_iterator=iter(["the capital of France is Paris", "and that of Spain"] * 4),
      model_prefix=str(folder / "spm" / "tokenizer"), model_type="bpe", vocab_size=40, minloglevel=2)
  for name in ("hf", "spm"):
    (folder / name / "tokenizer_config.json").write_text(json.dumps(
        dict(bos_token="<s>", eos_token={"content": "</s>"}, add_bos_token=True, chat_template="{{ a }}",
             added_tokens_decoder={"40": {"content": "<x>", "special": True}} if name == "spm" else {})))
    (folder / name / "generation_config.json").write_text('{"eos_token_id": [1, 2]}')
  return folder


def use_tokenizer(path):
  tokenizer = load_tokenizer(path)
  ids = tokenizer.encode("the <s>capital</s> ab")
  tokenizer.decode(ids)
  assert isinstance(tokenizer.bos_token + tokenizer.eos_token, str)
  assert all(isinstance(i, int) for i in tokenizer.eos_token_ids)
  assert isinstance(tokenizer.chat_template, str | None)


def load_weights(path):
  weights.load_model(ModelSource(str(path)))


FILES = {
    "hf/config.json": (damaged_json, load_weights), "hf/generation_config.json": (damaged_json, load_weights),
    "hf/model.safetensors.index.json": (damaged_json, load_weights),
    "hf/model-00001-of-00002.safetensors": (damaged_bytes, load_weights),
    "orbax/model_config.json": (damaged_json, lambda path: weights.load_config(ModelSource(str(path)))),
    "gguf/m.gguf": (damaged_bytes, lambda path: load_weights(path / "m.gguf")),
    "gguf/m.gguf, tokenizer": (damaged_bytes, lambda path: use_tokenizer(path / "m.gguf")),
    "hf/tokenizer.json": (damaged_json, use_tokenizer),
    "hf/tokenizer_config.json": (damaged_json, use_tokenizer),
    "spm/tokenizer_config.json": (damaged_json, use_tokenizer),
    "spm/generation_config.json": (damaged_json, use_tokenizer),
    "spm/tokenizer.model": (damaged_bytes, use_tokenizer),
}


@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_loads_or_is_one_line(name, folder):
  damage, use = FILES[name]
  file = folder / name.split(",")[0]
  original = file.read_bytes()
  damage = st.one_of(damage(original), damaged_bytes(original))
  with tempfile.TemporaryDirectory() as scratch:
    copy = pathlib.Path(scratch) / "m"
    shutil.copytree(file.parent, copy)
    use(copy)  # undamaged

    @hypothesis.settings(max_examples=60, deadline=None, database=None)
    @hypothesis.given(damage)
    def try_one(data):
      (copy / file.name).write_bytes(data)
      with warnings.catch_warnings():
        warnings.simplefilter("error")  # numpy's included
        try:
          use(copy)
        except ValueError as error:
          assert "\n" not in str(error) and len(str(error)) < 2000 and str(copy) in str(error)

    try_one()
