"""What is refused of a model's files before any library parses them, and in how many words."""

import os
import struct
import threading

import gguf
import numpy as np
import pytest
import tokenizers

from batchjax import model_files, weights
from batchjax.config import ConfigError, ModelSource
from batchjax.text.tokenizer import load_tokenizer


def test_an_object_is_read(tmp_path):
  (tmp_path / "a.json").write_text('{"é": [1]}', encoding="utf-8")
  assert model_files.read_object(tmp_path / "a.json") == {"é": [1]}


@pytest.mark.parametrize("content, message", [
    (b"", r"is not JSON \(Expecting value.*\): fetch it again"),
    (b"\xff{}", r"is not JSON \('utf-8' codec"),
    (b"[1]", "holds a list where an object is meant"),
    (b"[" * 100_000, "is not JSON"),
    (b"9" * 5_000, "is not JSON"),
])
def test_damage_is_one_line(content, message, tmp_path):
  (tmp_path / "a.json").write_bytes(content)
  with pytest.raises(ConfigError, match=rf"a\.json {message}") as error:
    model_files.read_object(tmp_path / "a.json")
  assert "\n" not in str(error.value)


def test_a_huge_file_is_not_read(tmp_path):
  with (tmp_path / "a.json").open("wb") as file:
    file.truncate(1 << 40)  # sparse
  with pytest.raises(ConfigError, match=r"a\.json has 1,099,511,627,776 bytes, more than any"):
    model_files.read_object(tmp_path / "a.json")


def fifo(path):
  os.mkfifo(path)


def folder(path):
  path.mkdir()


def loop(path):
  path.symlink_to(path)


def tiny_tokenizer(folder):
  backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab={"a": 0}, merges=[]))
  backend.decoder = tokenizers.decoders.ByteLevel()
  backend.save(str(folder / "tokenizer.json"))
  return folder


# What reads each file.
READERS = {
    "config.json": lambda path: weights.load_config(ModelSource(str(path.parent), format="hf")),
    "generation_config.json": lambda path: weights.load_config(ModelSource(str(path.parent))),
    "model_config.json": lambda path: weights.load_config(ModelSource(str(path.parent),
                                                                      format="orbax")),
    "model.safetensors": lambda path: weights.stored_dtype(ModelSource(str(path.parent))),
    "model.safetensors.index.json": lambda path: weights.stored_dtype(ModelSource(str(path.parent))),
    "m.gguf": lambda path: weights.load_config(ModelSource(str(path), format="gguf")),
    "tokenizer.json": lambda path: load_tokenizer(path.parent),
    "tokenizer.model": lambda path: load_tokenizer(path.parent),
    "tokenizer_config.json": lambda path: load_tokenizer(tiny_tokenizer(path.parent)),
    "chat_template.jinja": lambda path: load_tokenizer(tiny_tokenizer(path.parent)),
}


@pytest.mark.parametrize("make", [fifo, folder], ids=lambda make: make.__name__)
@pytest.mark.parametrize("name", READERS)
def test_what_is_no_file_is_named_and_never_waited_for(name, make, tmp_path):
  if name != "config.json":
    (tmp_path / "config.json").write_text("{}")
  make(tmp_path / name)
  errors = []

  def read():
    try:
      READERS[name](tmp_path / name)
    except ValueError as error:
      errors.append(error)

  thread = threading.Thread(target=read, daemon=True)  # one that waits would wait for ever
  thread.start()
  thread.join(60)
  assert not thread.is_alive() and len(errors) == 1
  message = str(errors[0])
  assert f"{tmp_path / name} is no regular file: put the model's own file there" in message
  assert "\n" not in message


def test_what_cannot_be_opened_is_named(tmp_path):
  loop(tmp_path / "a.json")
  (tmp_path / "b.json").symlink_to("nowhere")
  with pytest.raises(ConfigError, match=r"a\.json (is not there|cannot be read)"):
    model_files.read_object(tmp_path / "a.json")
  with pytest.raises(ConfigError, match=r"b\.json is not there: correct the path, or fetch the model again"):
    model_files.read_object(tmp_path / "b.json")
  with pytest.raises(ConfigError, match="cannot be read .*check its name"):
    model_files.check_file(tmp_path / ("x" * 5000))
  with pytest.raises(ConfigError, match="model.path='x{5000}' cannot be read"):
    weights.source_format(ModelSource("x" * 5000))


def gguf_bytes(*fields, num_tensors=0, num_fields=None):
  """A header with the given (key, type, value bytes)."""
  data = b"GGUF" + struct.pack("<IQQ", 3, num_tensors,
                               len(fields) if num_fields is None else num_fields)
  for key, kind, value in fields:
    data += struct.pack("<Q", len(key)) + key.encode() + struct.pack("<I", kind) + value
  return data


ARRAY, STRING, UINT8 = 9, 8, 0


@pytest.mark.parametrize("data, message", [
    (b"", "mmap an empty file"), (b"GGUF", "refers to byte"), (b"XXXX" + bytes(100), "magic invalid"),
    (b"GGUF" + struct.pack("<I", 99) + bytes(100), "version 99"),
    (gguf_bytes(num_fields=2**63), "refers to byte"),
    (gguf_bytes(num_tensors=2**63), "refers to byte"),
    (gguf_bytes(("a", STRING, struct.pack("<Q", 2**63))), "refers to byte"),
    (gguf_bytes(("a", ARRAY, struct.pack("<IQ", UINT8, 2**63) + bytes(64))), "an array of 9223372"),
    (gguf_bytes(("a", ARRAY, struct.pack("<IQ", UINT8, 2**20) + bytes(64))), "refers to byte"),
    (gguf_bytes(("a", 77, bytes(8))), "is not a valid GGUFValueType"),
])
def test_damaged_gguf_headers_are_one_line(data, message, tmp_path):
  (tmp_path / "m.gguf").write_bytes(data)
  with pytest.raises(ConfigError, match=rf"m\.gguf is damaged or incomplete \(.*{message}") as error:
    model_files.open_gguf(tmp_path / "m.gguf")
  assert "\n" not in str(error.value)
  with pytest.raises(ValueError, match=r"m\.gguf is damaged or incomplete"):
    load_tokenizer(tmp_path / "m.gguf")


@pytest.mark.parametrize("offset", [2**40, 2**64 - 8, 0])
def test_tensors_past_the_end_or_over_another_are_named(offset, tmp_path):
  path = tmp_path / "m.gguf"
  writer = gguf.GGUFWriter(path, "llama")
  for name in ("one", "two"):
    writer.add_tensor(name, np.zeros(64, np.float32))
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  model_files.open_gguf(path)
  data = path.read_bytes()
  at = data.index(b"two") + 3 + 4 + 8 + 4  # name, number of dimensions, the one dimension, type
  path.write_bytes(data[:at] + struct.pack("<Q", offset) + data[at + 8:])
  with pytest.raises(ConfigError, match=r"m\.gguf is damaged or incomplete \("):
    model_files.open_gguf(path)
