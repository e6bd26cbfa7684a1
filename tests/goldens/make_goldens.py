"""Writes the golden models: tiny random ones of every family with the logits of `transformers`.

  python tests/goldens/make_goldens.py

needs torch and transformers. For each family it writes beside itself

  <family>/config.json        the Hugging Face config
  <family>/model.safetensors  weights under Hugging Face names; float16, to keep them
                              small, and exactly what the float32 run below used
  <family>/logits.npz         tokens i32[3, 24] and logits f32[3, 24, V]

The rows of `tokens` share their first 9. The sizes are chosen so that every
trait of a family changes the result: windows shorter than the rows, soft caps
low enough to bend, rope scaling that reaches the frequencies of a short row.
"""

import json
import pathlib

import numpy as np
import safetensors.torch
import torch
import transformers

NUM_ROWS, ROW_LEN, SHARED_LEN = 3, 24, 9

COMMON = dict(vocab_size=128, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
              num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256,
              bos_token_id=1, eos_token_id=2, pad_token_id=0, attn_implementation="eager")

GEMMA = COMMON | dict(head_dim=16, query_pre_attn_scalar=24, sliding_window=5)

CONFIGS = {
    "llama": transformers.LlamaConfig(
        **COMMON | dict(eos_token_id=[2, 3]), head_dim=16,
        rope_parameters=dict(rope_type="llama3", rope_theta=10_000.0, factor=4.0,
                             low_freq_factor=1.0, high_freq_factor=4.0,
                             original_max_position_embeddings=32)),
    "mistral": transformers.MistralConfig(**COMMON, sliding_window=7),
    "qwen2": transformers.Qwen2Config(**COMMON, tie_word_embeddings=True),
    "qwen3": transformers.Qwen3Config(**COMMON, head_dim=16, tie_word_embeddings=True),
    "gemma2": transformers.Gemma2Config(
        **GEMMA, attn_logit_softcapping=2.0, final_logit_softcapping=3.0),
    "gemma3": transformers.Gemma3TextConfig(
        **GEMMA | dict(num_hidden_layers=6, num_key_value_heads=1, intermediate_size=32),
        rope_parameters=dict(
            full_attention=dict(rope_type="linear", rope_theta=1_000_000.0, factor=8.0),
            sliding_attention=dict(rope_type="default", rope_theta=10_000.0))),
}


def randomize(model: torch.nn.Module, generator: torch.Generator) -> None:
  """Draws every parameter, norms and biases too; values that float16 holds exactly."""
  for name, parameter in model.named_parameters():
    draw = torch.randn(parameter.shape, generator=generator)
    if parameter.ndim == 2:
      draw *= parameter.shape[1] ** -0.5 * (2.0 if "embed_tokens" in name else 1.5)
    elif "norm" in name:
      draw = 0.3 * draw + (0.0 if "gemma" in model.config.model_type else 1.0)
    parameter.data = draw.half().float()


def make_golden(family: str, config: transformers.PretrainedConfig,
                folder: pathlib.Path) -> None:
  """Writes the three files of one family."""
  generator = torch.Generator().manual_seed(sorted(CONFIGS).index(family))
  model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
  randomize(model, generator)
  tokens = torch.randint(4, config.vocab_size, (NUM_ROWS, ROW_LEN), generator=generator)
  tokens[:, :SHARED_LEN] = tokens[0, :SHARED_LEN]
  with torch.no_grad():
    logits = model(tokens).logits

  folder.mkdir(exist_ok=True)
  settings = config.to_diff_dict() | {"architectures": [type(model).__name__]}
  for name in ("transformers_version", "_attn_implementation"):
    settings.pop(name, None)
  (folder / "config.json").write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")
  # Tied heads are the embedding once more; checkpoints leave them out.
  weights = {name: value.half() for name, value in model.named_parameters()}
  safetensors.torch.save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
  np.savez_compressed(folder / "logits.npz", tokens=tokens.numpy().astype(np.int32),
                      logits=logits.numpy())
  print(f"{family}: logits std {logits.std():.3f}, max {logits.abs().max():.3f}, "
        f"{sum(f.stat().st_size for f in folder.iterdir()) / 1e3:.0f} kB")


def main() -> None:
  for family, config in CONFIGS.items():
    make_golden(family, config, pathlib.Path(__file__).parent / family)


if __name__ == "__main__":
  main()
