"""Vocabularies inside GGUF files: the real one, and tiny ones of every kind."""

import json
from pathlib import Path

import gguf
import pytest
import sentencepiece
import tokenizers
from gguf import TokenType
from tokenizers import normalizers, pre_tokenizers

from batchjax.text import load_tokenizer, render

GOLDENS = Path(__file__).with_name("smollm2_llama_cpp.jsonl")
# The patterns of Llama 3's and Qwen2's own tokenizer.json.
LLAMA3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
          r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
QWEN2 = LLAMA3.replace("{1,3}", "")
TEXTS = ["the capital of France is Paris", "it's  12345 and\n\n 7", "WE'VE naïve café e\u0301",
         "a  1\r\n\tb", "x=[1,22,333,4444];  ", "😀 日本語", "<|turn|>the</s>", ""]


def write_gguf(path: Path, kind: str, **arrays) -> Path:
  """Writes a file that holds a vocabulary and nothing else."""
  writer = gguf.GGUFWriter(path, "llama")
  writer.add_tokenizer_model(kind)
  for name, value in arrays.items():
    getattr(writer, f"add_{name}")(value)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  return path


@pytest.fixture
def byte_level_arrays(byte_level_folder):
  """The tiny byte-level vocabulary as the arrays of a GGUF file."""
  contents = json.loads((byte_level_folder / "tokenizer.json").read_text())
  added = {token["id"]: token for token in contents["added_tokens"]}
  ids = {**contents["model"]["vocab"], **{token["content"]: i for i, token in added.items()}}
  kinds = [TokenType.NORMAL] * len(ids)
  for i, token in added.items():
    kinds[i] = TokenType.CONTROL if token["special"] else TokenType.USER_DEFINED
  return {"token_list": sorted(ids, key=ids.get), "token_types": kinds,
          "token_merges": [" ".join(pair) for pair in contents["model"]["merges"]],
          "bos_token_id": 0, "eos_token_id": 1, "eot_token_id": 2}


@pytest.fixture(scope="module")
def smollm2(smollm2_gguf):
  return load_tokenizer(smollm2_gguf)


def test_real_vocabulary_against_llama_cpp(smollm2):
  """make_llama_cpp_goldens.py wrote the ids, with llama.cpp's tokenizer."""
  rows = [json.loads(line) for line in GOLDENS.read_text(encoding="utf-8").splitlines()]
  assert len(rows) == 600
  ids = smollm2.encode_batch([row["text"] for row in rows])
  assert [row["text"] for row, got in zip(rows, ids) if got != row["ids"]] == []
  # Special tokens, which decoding can leave out, are spelled here.
  assert all(smollm2.decode(row["ids"], skip_special_tokens=False) == row["text"] for row in rows)


def test_real_vocabulary_facts(smollm2):
  assert smollm2.vocab_size == 49152
  assert (smollm2.bos_token, smollm2.eos_token) == ("<|im_start|>", "<|im_end|>")
  assert smollm2.eos_token_ids == (2,)
  assert smollm2.special_ids == frozenset(range(17))
  assert smollm2.encode("2026") == smollm2.encode("2026", add_special_tokens=False)  # no BOS
  assert len(smollm2.encode("2026")) == 4  # a digit is a token
  assert len({smollm2.token_bytes(i) for i in range(49152)}) == 49152 - 17 + 1


def test_end_tokens_roles_and_named_templates(tmp_path, byte_level_arrays):
  arrays = byte_level_arrays | {"eot_token_id": 5, "eom_token_id": 6, "pad_token_id": 7,
                                "unk_token_id": 1 << 20}
  turn_end = arrays["token_list"].index("<think>")  # no merge makes it
  arrays["token_list"] = ["<|im_end|>" if i == turn_end else token
                          for i, token in enumerate(arrays["token_list"])]
  arrays["chat_template"] = [{"name": "default", "template": "d"},
                             {"name": "tool_use", "template": "t"}]
  tokenizer = load_tokenizer(write_gguf(tmp_path / "v.gguf", "gpt2", tokenizer_pre="gpt-2",
                                        **arrays))
  assert tokenizer.eos_token_ids == (1, turn_end, 5, 6)
  assert tokenizer.special_tokens == {"bos_token": "<s>", "eos_token": "</s>",
                                      "pad_token": arrays["token_list"][7]}
  assert tokenizer.chat_templates == {"default": "d", "tool_use": "t"}


def test_real_chat_template(smollm2):
  messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."},
              {"role": "user", "content": [{"type": "text", "text": "Bye"}]}]
  text = render(smollm2.chat_template, messages, bos_token=smollm2.bos_token,
                eos_token=smollm2.eos_token)
  assert text == (
      "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
      "<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello.<|im_end|>\n"
      "<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n")
  ids = smollm2.encode(text, add_special_tokens=False)
  assert ids[0] == 1 and ids.count(1) == 5 and ids.count(2) == 4
  assert smollm2.decode(ids, skip_special_tokens=False) == text


def test_json_form_is_the_same_tokenizer(smollm2, tmp_path):
  (tmp_path / "tokenizer.json").write_text(smollm2.to_json(), encoding="utf-8")
  (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<|im_end|>"}')
  copy = load_tokenizer(tmp_path)
  assert copy.encode_batch(TEXTS) == smollm2.encode_batch(TEXTS)
  assert copy.special_ids == smollm2.special_ids
  assert all(copy.token_bytes(i) == smollm2.token_bytes(i) for i in range(smollm2.vocab_size))


@pytest.mark.parametrize(("pre", "expected"), [
    ("gpt-2", [pre_tokenizers.ByteLevel(add_prefix_space=False)]),
    ("smollm", [pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False)]),
    ("qwen2", [pre_tokenizers.Split(tokenizers.Regex(QWEN2), "isolated"),
               pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]),
    ("llama-bpe", [pre_tokenizers.Split(tokenizers.Regex(LLAMA3), "isolated"),
                   pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])])
def test_byte_level_kinds(tmp_path, byte_level_folder, byte_level_arrays, pre, expected):
  tokenizer = load_tokenizer(write_gguf(tmp_path / "v.gguf", "gpt2", tokenizer_pre=pre,
                                        **byte_level_arrays))
  reference = tokenizers.Tokenizer.from_file(str(byte_level_folder / "tokenizer.json"))
  reference.pre_tokenizer = pre_tokenizers.Sequence(expected)
  if pre == "qwen2":
    reference.normalizer = normalizers.NFC()
  bos = [0] if pre == "llama-bpe" else []
  for text in TEXTS:
    assert tokenizer.encode(text) == bos + reference.encode(text).ids
  original = load_tokenizer(byte_level_folder)
  assert tokenizer.special_ids == original.special_ids
  assert tokenizer.eos_token_ids == (1, 2)
  assert all(tokenizer.token_bytes(i) == original.token_bytes(i)
             for i in range(original.vocab_size))


def test_whole_words_go_before_merges_in_llama3(tmp_path):
  arrays = {"token_list": ["a", "b", "c", "ab", "abc"], "token_merges": ["a b"]}
  by_kind = {pre: load_tokenizer(write_gguf(tmp_path / f"{pre}.gguf", "gpt2", tokenizer_pre=pre,
                                            **arrays)) for pre in ("llama-bpe", "qwen2")}
  assert by_kind["llama-bpe"].encode("abc") == [4]
  assert by_kind["qwen2"].encode("abc") == [3, 2]


def test_metadata_decides_on_bos(tmp_path, byte_level_arrays):
  for adds_bos in (True, False):
    tokenizer = load_tokenizer(write_gguf(
        tmp_path / f"{adds_bos}.gguf", "gpt2", tokenizer_pre="llama-bpe", add_bos_token=adds_bos,
        **byte_level_arrays))
    assert tokenizer.encode("the")[:1] == ([0] if adds_bos else
                                           tokenizer.encode("the", add_special_tokens=False)[:1])


@pytest.mark.parametrize("has_space_prefix", [True, False])
def test_sentencepiece_kind(tmp_path, sentencepiece_model, has_space_prefix):
  processor = sentencepiece.SentencePieceProcessor(model_file=str(sentencepiece_model))
  ids = range(processor.get_piece_size())
  kinds = [TokenType.UNKNOWN if processor.is_unknown(i) else TokenType.CONTROL
           if processor.is_control(i) else TokenType.BYTE if processor.is_byte(i)
           else TokenType.NORMAL for i in ids]
  path = write_gguf(tmp_path / "v.gguf", "llama", token_types=kinds, bos_token_id=1,
                    token_list=[processor.id_to_piece(i) for i in ids], eos_token_id=2,
                    token_scores=[processor.get_score(i) for i in ids],
                    add_space_prefix=has_space_prefix)
  tokenizer, original = load_tokenizer(path), load_tokenizer(sentencepiece_model)
  assert tokenizer.special_ids == original.special_ids
  assert all(tokenizer.token_bytes(i) == original.token_bytes(i) for i in ids)
  # Behind a special token a written space is one more here, as in llama.cpp.
  for text in [*TEXTS, "[INST]the theatre[INST]a", "the  \n\n  absurd 1234"]:
    if has_space_prefix:
      assert tokenizer.encode(text) == original.encode(text)
    elif "[INST]" not in text and "</s>" not in text and text:
      spaced = tokenizer.encode(f" {text}", add_special_tokens=False)
      assert spaced == processor.encode(text)
      assert tokenizer.decode(spaced) == f" {text}"


def test_pieces_with_spaces_that_users_defined(tmp_path):
  tokens = ["<unk>", "a", "▁", "▁▁▁", "<mark>"]
  kinds = [TokenType.UNKNOWN, TokenType.NORMAL, TokenType.NORMAL, TokenType.USER_DEFINED,
           TokenType.USER_DEFINED]
  tokenizer = load_tokenizer(write_gguf(
      tmp_path / "v.gguf", "llama", token_list=tokens, token_types=kinds,
      token_scores=[0.0] * 5, add_space_prefix=False))
  assert tokenizer.encode("a   a <mark>a") == [1, 3, 1, 2, 4, 1]
  assert tokenizer.decode([1, 3, 1, 2, 4]) == "a   a <mark>"


def test_what_is_not_known_here(tmp_path, byte_level_arrays):
  with pytest.raises(ValueError, match="pre-tokenizer 'tekken'.*llama-bpe.*tokenizer.json"):
    load_tokenizer(write_gguf(tmp_path / "a.gguf", "gpt2", tokenizer_pre="tekken",
                              **byte_level_arrays))
  with pytest.raises(ValueError, match="kind 'bert'"):
    load_tokenizer(write_gguf(tmp_path / "b.gguf", "bert", **byte_level_arrays))
  with pytest.raises(ValueError, match="without scores"):
    load_tokenizer(write_gguf(tmp_path / "c.gguf", "llama", token_list=["a"]))
  with pytest.raises(ValueError, match="holds no vocabulary"):
    load_tokenizer(write_gguf(tmp_path / "d.gguf", "gpt2"))
