"""tokenizer.json files and the configuration beside them."""

import json

import pytest
import tokenizers
from tokenizers import decoders, models

from batchjax.text import load_tokenizer
from batchjax.text.hf_vocab import byte_level_bytes, metaspace_bytes


def test_ids_are_those_of_the_library(byte_level_folder, metaspace_folder):
  for folder in (byte_level_folder, metaspace_folder):
    tokenizer = load_tokenizer(folder)
    backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    for text in ("the capital of France", "é😀", "  </s> the", ""):
      assert tokenizer.encode(text) == backend.encode(text).ids
      assert (tokenizer.encode(text, add_special_tokens=False)
              == backend.encode(text, add_special_tokens=False).ids)


def test_every_token_decodes_as_in_the_library(byte_level_folder, metaspace_folder):
  for folder in (byte_level_folder, metaspace_folder):
    tokenizer = load_tokenizer(folder)
    backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert tokenizer.vocab_size == backend.get_vocab_size()
    for i in range(tokenizer.vocab_size):
      assert tokenizer.decode([i]) == backend.decode([i])
      assert tokenizer.decode([i, i]) == backend.decode([i, i])


def test_added_tokens_are_their_own_text(byte_level_folder):
  tokenizer = load_tokenizer(byte_level_folder)
  [think] = tokenizer.encode("<think>")
  assert think not in tokenizer.special_ids
  assert tokenizer.token_bytes(think) == b"<think>"
  [latin] = tokenizer.encode("né e")
  assert tokenizer.token_bytes(latin) == "né e".encode()


def test_config_names_the_tokens_and_template(byte_level_folder):
  tokenizer = load_tokenizer(byte_level_folder)
  assert (tokenizer.bos_token, tokenizer.eos_token) == ("<s>", "<|turn|>")
  assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 2)
  assert tokenizer.chat_template == "{{ messages[0]['content'] }}"
  assert load_tokenizer(byte_level_folder / "tokenizer.json").eos_token_id == 2


def test_files_beside_the_config(byte_level_folder, write_tokenizer):
  backend = tokenizers.Tokenizer.from_file(str(byte_level_folder / "tokenizer.json"))
  folder = write_tokenizer(backend, eos_token="</s>", chat_template=[
      {"name": "rag", "template": "r"}, {"name": "default", "template": "d"}])
  (folder / "special_tokens_map.json").write_text(json.dumps(
      {"bos_token": {"content": "<s>"}, "eos_token": "<|turn|>"}))
  (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 1]}))
  tokenizer = load_tokenizer(folder)
  assert tokenizer.bos_token_id == 0  # only special_tokens_map.json has it
  assert tokenizer.eos_token_id == 1  # tokenizer_config.json wins
  assert tokenizer.eos_token_ids == (1, 2)
  assert tokenizer.chat_template == "d"
  assert tokenizer.chat_templates == {"rag": "r", "default": "d"}
  (folder / "chat_template.jinja").write_text("file")
  assert load_tokenizer(folder).chat_templates == {"default": "file"}
  (folder / "additional_chat_templates").mkdir()
  (folder / "additional_chat_templates/tool_use.jinja").write_text("tools")
  assert load_tokenizer(folder).chat_templates == {"default": "file", "tool_use": "tools"}


@pytest.mark.parametrize("name", ["<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<end_of_turn>"])
@pytest.mark.parametrize("special", [True, False])
def test_the_end_of_a_turn_ends_a_text(byte_level_folder, write_tokenizer, name, special):
  """Tuned models often name only the end of a text."""
  backend = tokenizers.Tokenizer.from_file(str(byte_level_folder / "tokenizer.json"))
  backend.add_tokens([tokenizers.AddedToken(name, special=special)])
  folder = write_tokenizer(backend, eos_token="</s>")
  (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 2}))
  assert load_tokenizer(folder).eos_token_ids == (1, backend.token_to_id(name), 2)


def test_tokens_that_have_a_role_are_special(write_tokenizer):
  """Whether the file adds them without saying so, or has them in its vocabulary alone."""
  backend = tokenizers.Tokenizer(models.BPE(
      vocab={token: i for i, token in enumerate(["</s>", "a", "<", "/", "s", ">", "<pad>"])},
      merges=[]))
  backend.decoder = decoders.ByteLevel()
  backend.add_tokens(["<turn>"])
  assert load_tokenizer(write_tokenizer(backend)).encode("a</s>") == [1, 2, 3, 4, 5]
  tokenizer = load_tokenizer(write_tokenizer(backend, eos_token="</s>", mask_token="<turn>",
                                             pad_token="<no such>"))
  assert tokenizer.encode("a</s><turn>") == [1, 0, 7]
  assert tokenizer.special_ids == {0, 7}
  split = load_tokenizer(write_tokenizer(backend, eos_token="</s>"), split_special_tokens=True)
  assert split.encode("a</s>") == [1, 2, 3, 4, 5]


def test_tokens_that_have_a_role(byte_level_folder, write_tokenizer):
  backend = tokenizers.Tokenizer.from_file(str(byte_level_folder / "tokenizer.json"))
  folder = write_tokenizer(
      backend, bos_token=None, pad_token="<pad>", unk_token={"content": "<unk>", "lstrip": False},
      add_bos_token=False, image_token="<image>", extra_special_tokens={"boi_token": "<boi>"},
      additional_special_tokens=["<x>"], tokenizer_class="X")
  (folder / "special_tokens_map.json").write_text(json.dumps({"mask_token": "<m>"}))
  assert load_tokenizer(folder).special_tokens == {
      "pad_token": "<pad>", "unk_token": "<unk>", "image_token": "<image>", "boi_token": "<boi>",
      "mask_token": "<m>"}


@pytest.mark.parametrize(("folder_name", "adds_bos"), [
    ("byte_level_folder", None), ("byte_level_folder", True), ("byte_level_folder", False),
    ("metaspace_folder", None), ("metaspace_folder", True), ("metaspace_folder", False)])
def test_add_bos_token_has_the_last_word(request, write_tokenizer, folder_name, adds_bos):
  source = request.getfixturevalue(folder_name)
  backend = tokenizers.Tokenizer.from_file(str(source / "tokenizer.json"))
  config = {} if adds_bos is None else {"add_bos_token": adds_bos}
  tokenizer = load_tokenizer(write_tokenizer(backend, bos_token="<s>", **config))
  expected = folder_name == "metaspace_folder" if adds_bos is None else adds_bos
  plain = tokenizer.encode("the", add_special_tokens=False)
  assert tokenizer.encode("the") == [tokenizer.bos_token_id] * expected + plain
  # What is written out has the same rule in itself.
  assert tokenizers.Tokenizer.from_str(tokenizer.to_json()).encode("the").ids == \
      tokenizer.encode("the")


def test_truncation_and_padding_of_the_file_are_ignored(byte_level_folder, write_tokenizer):
  backend = tokenizers.Tokenizer.from_file(str(byte_level_folder / "tokenizer.json"))
  backend.enable_truncation(2)
  backend.enable_padding()
  tokenizer = load_tokenizer(write_tokenizer(backend))
  assert [tokenizer.decode(ids) for ids in tokenizer.encode_batch(["a b c d", "a"])] == [
      "a b c d", "a"]
  assert len(tokenizer.encode_batch(["a b c d", "a"])[1]) == 1


def test_what_the_files_get_wrong(byte_level_folder, write_tokenizer, tmp_path):
  backend = tokenizers.Tokenizer.from_file(str(byte_level_folder / "tokenizer.json"))
  with pytest.raises(ValueError, match="lacks the token '<eot>'"):
    load_tokenizer(write_tokenizer(backend, eos_token="<eot>"))
  with pytest.raises(ValueError, match="names no bos_token"):
    load_tokenizer(write_tokenizer(backend, add_bos_token=True))
  (tmp_path / "tokenizer_config.json").write_text("{")
  with pytest.raises(ValueError, match="tokenizer_config.json is not JSON"):
    load_tokenizer(tmp_path)
  for text, message in (("[]", "tokenizer.json holds a list where an object is meant"),
                        ("{}", "is not a tokenizer.json: it has no `model`"),
                        ('{"model": 3}', "tokenizer.json is damaged or incomplete")):
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(ValueError, match=message):
      load_tokenizer(tmp_path)


@pytest.mark.parametrize("file, values, message", [
    ("tokenizer_config.json", dict(bos_token=7), "names the token 7, which is no string"),
    ("tokenizer_config.json", dict(chat_template=7), "chat_template must be a string"),
    ("tokenizer_config.json", dict(chat_template=[{"name": "default"}]), "KeyError: 'template'"),
    ("generation_config.json", dict(eos_token_id=[1, "2"]), "token id '2' is no integer"),
    ("generation_config.json", dict(eos_token_id=-1), "token id -1 is no integer"),
])
def test_wrong_settings_beside_a_tokenizer_are_named(byte_level_folder, write_tokenizer, file, values,
                                                     message):
  folder = write_tokenizer(tokenizers.Tokenizer.from_file(str(byte_level_folder / "tokenizer.json")))
  (folder / file).write_text(json.dumps(values))
  with pytest.raises(ValueError, match=message) as error:
    load_tokenizer(folder)
  assert "\n" not in str(error.value) and str(folder) in str(error.value)


def test_a_token_id_that_would_fill_the_memory_is_named(write_tokenizer):
  backend = tokenizers.Tokenizer(models.BPE(vocab={"a": 0, "b": 1}, merges=[]))
  backend.decoder = decoders.ByteLevel()
  file = write_tokenizer(backend) / "tokenizer.json"
  file.write_text(file.read_text().replace('"b": 1', f'"b": {2**31}'))
  with pytest.raises(ValueError, match="token id 2147483648 is no integer from 0 to 16777215"):
    load_tokenizer(file)


@pytest.mark.parametrize("decoder", [decoders.WordPiece(), None,
                                     decoders.Sequence([decoders.Replace("_", " ")]),
                                     decoders.Sequence([decoders.Replace("▁", " "),
                                                        decoders.Strip(" ", 2, 0)])])
def test_decoders_without_fixed_bytes_are_refused(write_tokenizer, decoder):
  backend = tokenizers.Tokenizer(models.BPE(vocab={"a": 0}, merges=[]))
  if decoder is not None:
    backend.decoder = decoder
  with pytest.raises(ValueError, match="has the decoder"):
    load_tokenizer(write_tokenizer(backend))


@pytest.mark.parametrize(("scheme", "text"), [("always", "a a"), ("never", " a a")])
def test_metaspace_decoder(write_tokenizer, scheme, text):
  backend = tokenizers.Tokenizer(models.BPE(vocab={"▁a": 0}, merges=[]))
  backend.decoder = decoders.Metaspace(prepend_scheme=scheme)
  assert load_tokenizer(write_tokenizer(backend)).decode([0, 0]) == text == backend.decode([0, 0])


def test_bytes_of_tokens():
  assert byte_level_bytes("ĠcafÃ©Ċ") == " café\n".encode()
  assert byte_level_bytes("a b") == b"a b"  # a space is not in the alphabet
  assert byte_level_bytes("日") == "日".encode()
  assert metaspace_bytes("▁a▁") == b" a "
  assert metaspace_bytes("<0xE2>") == b"\xe2"
  assert metaspace_bytes("<0xZZ>") == b"<0xZZ>"
