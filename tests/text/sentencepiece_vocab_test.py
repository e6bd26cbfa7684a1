"""SentencePiece models, against the library itself."""

import io
import json
import shutil

import pytest
import sentencepiece

from batchjax.text import load_tokenizer, render


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


def test_behind_a_control_token_there_is_one_space_written_or_not(sentencepiece_model, processor):
  """So a template's text has the ids that mistral-common makes of the parts by themselves."""
  tokenizer = load_tokenizer(sentencepiece_model)
  inst, bos = processor.piece_to_id("[INST]"), processor.bos_id()
  the, space = processor.encode("the"), processor.piece_to_id("▁")
  for text in ("<s>[INST] the[INST] the", "<s>[INST]the[INST] the", "<s>[INST]the[INST]the"):
    assert tokenizer.encode(text, add_special_tokens=False) == [bos, inst, *the, inst, *the]
  assert tokenizer.encode("[INST]  the", False) == [inst, *processor.encode(" the")]
  assert tokenizer.encode("[INST] [INST]", False) == [inst, space, inst]
  assert tokenizer.encode(" the[INST]", False) == [*processor.encode(" the"), inst]
  assert tokenizer.decode([inst]) == ""


def test_without_legacy_only_the_begin_of_a_text_gets_a_space(sentencepiece_model, tmp_path,
                                                              processor):
  shutil.copy(sentencepiece_model, tmp_path)
  (tmp_path / "tokenizer_config.json").write_text(json.dumps({"legacy": False}))
  tokenizer = load_tokenizer(tmp_path)
  inst, the = processor.piece_to_id("[INST]"), processor.encode("the")
  unprefixed = tokenizer.encode("[INST]the", False)
  assert unprefixed[0] == inst and unprefixed[1:] != the
  assert tokenizer.decode(unprefixed, is_continuation=True) == "the"
  assert tokenizer.encode("the[INST] the", False) == [*the, inst, *the]


def test_models_that_take_spaces_away(tmp_path):
  model = io.BytesIO()
  sentencepiece.SentencePieceTrainer.train(
      sentence_iterator=iter(["the cat and the dog"] * 20), model_writer=model, vocab_size=30,
      control_symbols=["[INST]"], hard_vocab_limit=False, minloglevel=2)
  (tmp_path / "tokenizer.model").write_bytes(model.getvalue())
  tokenizer = load_tokenizer(tmp_path)
  inst, the = tokenizer.encode("[INST]", False), tokenizer.encode("the", False)
  for text in ("[INST] the", "[INST]the", "[INST]  the"):
    assert tokenizer.encode(text, False) == inst + the


def test_control_tokens_come_from_the_template_and_not_from_messages(sentencepiece_model,
                                                                     processor):
  """mistral-common encodes what a user wrote with the library, which reads no control tokens."""
  tokenizer = load_tokenizer(sentencepiece_model)
  inst, bos, eos = (processor.piece_to_id(name) for name in ("[INST]", "<s>", "</s>"))
  template = ("{{ bos_token }}{% for m in messages %}[INST] {{ m.content }}"
              "{{ eos_token }}{% endfor %}")
  for content in ("the", "of [INST] the</s>", "[INST]", "<s>[INST]", "the [INS", "T] the", "▁"):
    text = render(template, [{"role": "user", "content": content}] * 2,
                  special_tokens=tokenizer.special_tokens, special_text=tokenizer.special_text)
    turn = [inst, *processor.encode(content), eos]
    assert tokenizer.encode_chat([text]) == [[bos, *turn, *turn]]
  # A prompt is its own template.
  assert tokenizer.encode("[INST] the", False) == [inst, *processor.encode("the")]
  split = load_tokenizer(sentencepiece_model, split_special_tokens=True)
  assert split.encode("[INST] the") == [bos, *processor.encode("[INST] the")]


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


def test_added_tokens_of_older_folders(sentencepiece_model, tmp_path, processor):
  shutil.copy(sentencepiece_model, tmp_path)
  first = processor.get_piece_size()
  (tmp_path / "added_tokens.json").write_text(json.dumps(
      {"<|im_end|>": first, "<tool>": first + 1, "<|x|>": first + 2}))
  (tmp_path / "special_tokens_map.json").write_text(json.dumps(
      {"eos_token": "<|im_end|>", "additional_special_tokens": ["<|x|>"]}))
  tokenizer = load_tokenizer(tmp_path)
  the = processor.encode("the")
  assert tokenizer.encode("the<tool><|x|><|im_end|>", False) == [*the, first + 1, first + 2, first]
  assert tokenizer.eos_token_ids == (first,)
  assert {first, first + 2} <= tokenizer.special_ids and first + 1 not in tokenizer.special_ids


def test_other_files_of_that_name(tmp_path):
  path = tmp_path / "tokenizer.model"
  path.write_text("IQ== 0\nIg== 1\n")  # tiktoken ranks
  with pytest.raises(ValueError, match="not a SentencePiece model"):
    load_tokenizer(path)


def test_there_is_no_json_form(sentencepiece_model):
  with pytest.raises(ValueError, match="copy its .model file"):
    load_tokenizer(sentencepiece_model).to_json()
