"""Writes smollm2_llama_cpp.jsonl: texts and the ids that llama.cpp's own tokenizer gives them.

  pip install xllamacpp
  python tests/text/make_llama_cpp_goldens.py SmolLM2-135M-Instruct.Q4_1.gguf

The texts are strung together at random from fragments that tokenizers disagree about: runs of
spaces before digits, contractions, scripts, emoji made of several code points, code, special
tokens.
"""

import json
import random
import sys
import urllib.request
from pathlib import Path

FRAGMENTS = """the|The capital of France is| Paris|It's|it'll|WE'VE|don’t|naïve café|Zürich|straße
0|7|42|1234567890|3.14159|1,319|2026-11-22|½|٣٤٥|Ⅷ|²|x²+y²
def f(x):|return x[::-1]|for (int i = 0; i < n; ++i) {|}|"key": null,|<div class="a">|a_b__c
$HOME/*.py|#!/bin/sh
你好，世界|こんにちは|안녕하세요|Привет, мир|שלום|مرحبا|नमस्ते|สวัสดี|ΑΒΓ αβγ
😀|👩‍👩‍👧‍👦|🇫🇷|👍🏽|❤️|\u200d|\ufeff|\u00a0|\u3000|\u2028|e\u0301
<repo_name>|<filename>|<jupyter_code>
!|?!|...|---|'|''|"|``|«»|—|\\|/|@|&amp;|http://a.b/c?d=e&f#g"""
SPACES = ["", "", " ", " ", "  ", "   ", "     ", "\n", "\n\n", " \n", "\t", "\r\n", "\n  ", " \t "]
NUM_TEXTS = 600


def make_texts() -> list[str]:
  fragments = [fragment for line in FRAGMENTS.splitlines() for fragment in line.split("|")]
  # These hold the separator.
  fragments += ["<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|im_start|>user"]
  draw = random.Random(0)
  return [draw.choice(SPACES) + "".join(draw.choice(fragments) + draw.choice(SPACES)
                                        for _ in range(draw.randint(1, 8)))
          for _ in range(NUM_TEXTS)]


def main() -> None:
  import xllamacpp

  params = xllamacpp.CommonParams()
  params.model.path = sys.argv[1]
  params.n_ctx = 512
  server = xllamacpp.Server(params)
  out = Path(__file__).with_name("smollm2_llama_cpp.jsonl")
  with out.open("w", encoding="utf-8") as file:
    for text in make_texts():
      body = {"content": text, "add_special": True, "parse_special": True}
      request = urllib.request.Request(f"{server.listening_address}/tokenize",
                                       json.dumps(body).encode(),
                                       {"Content-Type": "application/json"})
      with urllib.request.urlopen(request) as answer:
        ids = json.load(answer)["tokens"]
      file.write(json.dumps({"text": text, "ids": ids}, separators=(",", ":")) + "\n")


if __name__ == "__main__":
  main()
