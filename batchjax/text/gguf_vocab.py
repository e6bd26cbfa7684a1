"""Vocabularies inside GGUF files, rebuilt as `tokenizers` pipelines."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gguf import TokenType
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

from batchjax.model_files import open_gguf
from batchjax.text.hf_vocab import (TokenizersCodec, bos_processor, byte_level_bytes,
                                    metaspace_bytes)
from batchjax.text.vocab import Vocab, end_tokens

# Where words end, as the models' own tokenizer.json files say; {digits} is how many digits go
# together.
_WORDS = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{digits}"
          r"| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")

# Names of `tokenizer.ggml.pre` that mean one of the splits below.
_SPLITS = {"smollm": "smollm", "gpt-2": "gpt-2", "qwen2": "qwen2", "deepseek-r1-qwen": "qwen2",
           "llama-bpe": "llama-bpe", "llama3": "llama-bpe", "llama-v3": "llama-bpe"}

# What templates call a token, and the key that GGUF has for it ("seperator" is its spelling).
_ROLES = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding",
          "sep_token": "seperator", "cls_token": "cls", "mask_token": "mask"}


def read_gguf(path: Path) -> Vocab:
  """Reads the vocabulary of a GGUF file.

  Raises:
    ValueError: the file has no vocabulary, or one of a kind that is not known here.
  """
  fields = {name.removeprefix("tokenizer."): field
            for name, field in open_gguf(path).fields.items()
            if name.startswith("tokenizer.")}

  def read(name: str, default: Any = None) -> Any:
    return fields[name].contents() if name in fields else default

  kind, tokens = read("ggml.model"), read("ggml.tokens")
  if kind is None or tokens is None:
    raise ValueError(f"{path} holds no vocabulary: name a tokenizer of its own")
  types = read("ggml.token_type", [int(TokenType.NORMAL)] * len(tokens))
  if kind == "gpt2":
    split = _split_name(read("ggml.pre"), path)
    backend = _byte_level_backend(tokens, read("ggml.merges", []), split)
    to_bytes, has_space_prefix, adds_bos = byte_level_bytes, False, split == "llama-bpe"
  elif kind == "llama":
    if "ggml.scores" not in fields:
      raise ValueError(f"{path} has a 'llama' vocabulary without scores: it is incomplete; "
                       "name a tokenizer.json or SentencePiece model instead")
    has_space_prefix, adds_bos = read("ggml.add_space_prefix", True), True
    backend = _sentencepiece_backend(tokens, read("ggml.scores"), types, has_space_prefix)
    to_bytes = metaspace_bytes
  else:
    raise ValueError(f"{path} has a vocabulary of the kind {kind!r}; known are 'gpt2' and 'llama': "
                     "name a tokenizer.json or SentencePiece model instead")

  special, added = _add_tokens(backend, tokens, types)
  for name in ("bos", "eos", "eot", "eom"):
    token_id = read(f"ggml.{name}_token_id", 0)
    if not (type(token_id) is int and 0 <= token_id < len(tokens)):
      raise ValueError(f"{path}: tokenizer.ggml.{name}_token_id={token_id!r} is none of the {len(tokens)} "
                       "tokens: fetch the file again")
  bos_token_id = read("ggml.bos_token_id")
  if bos_token_id is not None and read("ggml.add_bos_token", adds_bos):
    backend.post_processor = bos_processor(tokens[bos_token_id], bos_token_id)
  id_of = {token: i for i, token in reversed(list(enumerate(tokens)))}
  eos_token_ids = end_tokens(read("ggml.eos_token_id"), id_of.get,
                             read("ggml.eot_token_id"), read("ggml.eom_token_id"))
  roles = {name: read(f"ggml.{key}_token_id") for name, key in _ROLES.items()}
  chat_templates = {name.removeprefix("chat_template").removeprefix(".") or "default": read(name)
                    for name in fields
                    if name == "chat_template" or name.startswith("chat_template.")}
  # A byte-level vocabulary writes the tokens added to it as they are, not in its alphabet.
  is_literal = special | added if kind == "gpt2" else special
  return Vocab(TokenizersCodec(backend),
               [token.encode() if i in is_literal else to_bytes(token)
                for i, token in enumerate(tokens)],
               frozenset(special), has_space_prefix, bos_token_id, eos_token_ids,
               {name: tokens[i] for name, i in roles.items() if i is not None and i < len(tokens)},
               chat_templates)


def _split_name(name: str | None, path: Path) -> str:
  if name not in _SPLITS:
    raise ValueError(f"{path} names the pre-tokenizer {name!r} (tokenizer.ggml.pre); known are "
                     f"{sorted(_SPLITS)}: name the model's tokenizer.json as its tokenizer instead")
  return _SPLITS[name]


def _byte_level_backend(tokens: Sequence[str], merges: Sequence[str],
                        split: str) -> tokenizers.Tokenizer:
  """BPE over bytes, as GPT-2 and its descendants use."""
  # Backwards, so that the first of equal tokens keeps the name.
  vocab = {token: i for i, token in reversed(list(enumerate(tokens)))}
  pairs = [tuple(merge.split(" ", 1)) for merge in merges]
  backend = tokenizers.Tokenizer(
      models.BPE(vocab=vocab, merges=pairs, ignore_merges=split == "llama-bpe"))
  words = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split in ("smollm", "gpt-2"))
  if split == "smollm":
    words = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), words])
  elif split != "gpt-2":
    pattern = _WORDS.format(digits="" if split == "qwen2" else "{1,3}")
    words = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated"), words])
  if split == "qwen2":
    backend.normalizer = normalizers.NFC()
  backend.pre_tokenizer = words
  backend.decoder = decoders.ByteLevel()
  return backend


def _sentencepiece_backend(tokens: Sequence[str], scores: Sequence[float], types: Sequence[int],
                           has_space_prefix: bool) -> tokenizers.Tokenizer:
  """BPE over characters with bytes for what the vocabulary lacks.

  The file has scores where `tokenizers` wants merges: every way to put a piece
  together from two others is one, ranked by the piece's score.
  """
  mergeable = {TokenType.NORMAL, TokenType.USER_DEFINED}
  pieces = {token: i for i, token in enumerate(tokens) if types[i] in mergeable}
  by_score = sorted(pieces, key=lambda token: -scores[pieces[token]])
  merges = [(token[:cut], token[cut:]) for token in by_score for cut in range(1, len(token))
            if token[:cut] in pieces and token[cut:] in pieces]
  unknown = next((token for token, kind in zip(tokens, types) if kind == TokenType.UNKNOWN), None)
  vocab = {token: i for i, token in reversed(list(enumerate(tokens)))}
  backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token=unknown,
                                            fuse_unk=True, byte_fallback=True))
  spaces = normalizers.Replace(" ", "▁")
  strip = [decoders.Strip(" ", 1, 0)] if has_space_prefix else []
  backend.normalizer = (normalizers.Sequence([normalizers.Prepend("▁"), spaces])
                        if has_space_prefix else spaces)
  backend.decoder = decoders.Sequence(
      [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
  return backend


def _add_tokens(backend: tokenizers.Tokenizer, tokens: Sequence[str],
                types: Sequence[int]) -> tuple[set[int], set[int]]:
  """Tells the backend which tokens it must find in a text whole; (special, other) ids."""
  special = {i for i, kind in enumerate(types) if kind in (TokenType.CONTROL, TokenType.UNKNOWN)}
  added = {i for i, kind in enumerate(types) if kind == TokenType.USER_DEFINED}
  backend.add_special_tokens([tokenizers.AddedToken(tokens[i], normalized=False, special=True)
                              for i in sorted(special)])
  # A piece with the space mark in it can only be found after spaces were replaced.
  backend.add_tokens([tokenizers.AddedToken(tokens[i], normalized="▁" in tokens[i])
                      for i in sorted(added)])
  return special, added
