"""Makes smollm2_text.json: greedy text of SmolLM2 by Hugging Face transformers, float32.

    batchjax convert --source=SmolLM2-135M-Instruct.Q4_1.gguf --target=smollm2_hf
    python tests/goldens/make_smollm2_text.py smollm2_hf     # needs torch and transformers

Each entry holds the prompt's token ids, the generated ids, and at each step the gap
between the two largest logits, which tells a near tie from a mistake.
"""

import json
import pathlib
import sys

import torch
import transformers

NUM_TOKENS = 48
CHATS = (
    "What is the capital of France?",
    "Why is the sky blue? Answer in one sentence.",
    "Name three red fruits.",
    "Translate 'Good morning, my friend' into French.",
    "Write a Python function that returns the n-th Fibonacci number.",
    "Continue the sequence: 2, 4, 8, 16,",
    "Summarise the plot of Romeo and Juliet in two sentences.",
    "Is 17 a prime number? Explain briefly.",
    "List the days of the week.",
    "What does the word 'serendipity' mean?",
    "Write a haiku about the sea.",
    "Convert 100 degrees Celsius to Fahrenheit.",
)


def main(folder: str) -> None:
  here = pathlib.Path(__file__).parent
  tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
  model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
  lines = (here.parents[1] / "configs/examples/gsm8k_64.jsonl").read_text("utf-8").splitlines()
  prompts = [tokenizer(json.loads(line)["body"]["prompt"])["input_ids"] for line in lines[:8]]
  for chat in CHATS:
    text = tokenizer.apply_chat_template([{"role": "user", "content": chat}], tokenize=False,
                                         add_generation_prompt=True)
    prompts.append(tokenizer(text, add_special_tokens=False)["input_ids"])
  entries = []
  for prompt in prompts:
    out = model.generate(torch.tensor([prompt]), max_new_tokens=NUM_TOKENS, do_sample=False,
                         output_logits=True, return_dict_in_generate=True, pad_token_id=2)
    top = [step[0].topk(2).values for step in out.logits]
    entries.append({"prompt": prompt, "tokens": out.sequences[0, len(prompt):].tolist(),
                    "gaps": [round(float(t[0] - t[1]), 5) for t in top]})
    print(repr(tokenizer.decode(entries[-1]["tokens"]))[:100], min(entries[-1]["gaps"]))
  (here / "smollm2_text.json").write_text(json.dumps(entries, separators=(",", ":")) + "\n")


if __name__ == "__main__":
  main(*sys.argv[1:])
