"""SentencePiece models, against the library itself."""

import json
import shutil

import pytest
import sentencepiece

from batchjax.text import load_tokenizer


@pytest.fixture
def processor(sentencepiece_model):
  return sentencepiece.SentencePieceProcessor(model_file=str(sentencepiece_model))


def test_ids_and_text_are_those_of_the_library(sentencepiece_model, processor):
  tokenizer = load_tokenizer(sentencepiece_model)
  assert tokenizer.vocab_size == processor.get_piece_size()
  for text in ("the capital of France", " the", "naïve 日本 😀", "a\n\n  b", ""):
    ids = processor.encode(text)
    assert tokenizer.encode(text) == [processor.bos_id(), *ids]
    assert tokenizer.encode(text, add_special_tokens=False) == ids
    assert tokenizer.decode(ids) == processor.decode(ids) == text


def test_every_piece_decodes_as_in_the_library(sentencepiece_model, processor):
  tokenizer = load_tokenizer(sentencepiece_model)
  # At the start of a text the library keeps a space that came as a byte; Hugging Face and we do
  # not.
  space = processor.piece_to_id("<0x20>")
  assert tokenizer.decode([space, space]) == " "
  for i in sorted(set(range(tokenizer.vocab_size)) - tokenizer.special_ids - {space}):
    assert tokenizer.decode([i]) == processor.decode([i])


def test_control_tokens_split_the_text(sentencepiece_model, processor):
  tokenizer = load_tokenizer(sentencepiece_model)
  inst = processor.piece_to_id("[INST]")
  assert tokenizer.encode("[INST] the[INST]the", add_special_tokens=False) == [
      inst, *processor.encode(" the"), inst, *processor.encode("the")]
  assert tokenizer.decode([inst]) == ""


def test_config_beside_the_model(sentencepiece_model, tmp_path, processor):
  shutil.copy(sentencepiece_model, tmp_path)
  num_pieces = processor.get_piece_size()
  config = {"add_bos_token": False, "bos_token": "<s>", "eos_token": "<|im_end|>",
            "chat_template": "t", "added_tokens_decoder": {
                str(num_pieces): {"content": "<|im_end|>", "special": True},
                str(num_pieces + 1): {"content": "<tool>", "special": False}}}
  (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
  tokenizer = load_tokenizer(tmp_path)
  assert tokenizer.vocab_size == num_pieces + 2
  assert (tokenizer.bos_token, tokenizer.eos_token_id) == ("<s>", num_pieces)
  assert tokenizer.chat_template == "t"
  assert tokenizer.eos_token_ids == (num_pieces,)
  assert tokenizer.special_tokens == {"bos_token": "<s>", "eos_token": "<|im_end|>",
                                      "unk_token": "<unk>"}
  ids = tokenizer.encode("the<tool>the<|im_end|>")
  assert ids == [*processor.encode("the"), num_pieces + 1, *processor.encode("the"), num_pieces]
  assert tokenizer.decode(ids) == "the<tool> the"
  config["eos_token"] = "<eot>"
  (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
  with pytest.raises(ValueError, match="lacks the token '<eot>'"):
    load_tokenizer(tmp_path)


def test_other_files_of_that_name(tmp_path):
  path = tmp_path / "tokenizer.model"
  path.write_text("IQ== 0\nIg== 1\n")  # tiktoken ranks
  with pytest.raises(ValueError, match="not a SentencePiece model"):
    load_tokenizer(path)


def test_there_is_no_json_form(sentencepiece_model):
  with pytest.raises(ValueError, match="copy its .model file"):
    load_tokenizer(sentencepiece_model).to_json()
