"""`batchjax convert` as a user runs it."""

import json
import os
import pathlib
import shutil
import subprocess
import sys

import gguf
import ml_dtypes
import numpy as np
from safetensors.numpy import load_file

ROOT = pathlib.Path(__file__).parents[2]


def convert(*flags):
  return subprocess.run(
      [sys.executable, "scripts/convert.py", *map(str, flags)], cwd=ROOT, capture_output=True,
      text=True, env=os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)})


def assert_same_tensors(a, b):
  a, b = load_file(a / "model.safetensors"), load_file(b / "model.safetensors")
  assert a.keys() == b.keys()
  for name in a:
    assert a[name].dtype == b[name].dtype
    np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def test_there_and_back_through_orbax(tmp_path):
  source = tmp_path / "source"
  shutil.copytree(ROOT / "tests" / "goldens" / "gemma2", source)
  texts = {"tokenizer.json": "{}", "tokenizer.model": "m", "chat_template.jinja": "{{ x }}",
           "generation_config.json": '{"eos_token_id": [2, 5]}'}
  for name, text in texts.items():
    (source / name).write_text(text)
  there = convert(f"--source={source}", f"--target={tmp_path / 'orbax'}", "--format=orbax")
  assert there.returncode == 0, there.stderr
  assert "orbax, float16" in there.stdout
  back = convert(f"--source={tmp_path / 'orbax'}", f"--target={tmp_path / 'hf'}")
  assert back.returncode == 0, back.stderr
  again = convert(f"--source={tmp_path / 'orbax'}", f"--target={tmp_path / 'hf'}", "--overwrite")
  assert again.returncode == 0, again.stderr
  assert_same_tensors(source, tmp_path / "hf")
  assert_same_tensors(source, tmp_path / "hf.1")
  for name, text in texts.items():
    assert (tmp_path / "hf" / name).read_text() == text
  config = json.loads((tmp_path / "hf" / "config.json").read_text())
  assert (config["torch_dtype"], config["eos_token_id"]) == ("float16", [2, 5])
  assert not (tmp_path / "hf" / "logits.npz").exists()


def test_gguf_to_bfloat16_with_its_tokenizer(tmp_path):
  tokens = ["<unk>", "<s>", "</s>", "a", "b", "ab"]
  writer = gguf.GGUFWriter(tmp_path / "m.gguf", "qwen2")
  writer.add_block_count(1)
  writer.add_context_length(64)
  writer.add_embedding_length(8)
  writer.add_feed_forward_length(12)
  writer.add_head_count(2)
  writer.add_layer_norm_rms_eps(1e-6)
  writer.add_tokenizer_model("gpt2")
  writer.add_tokenizer_pre("gpt-2")
  writer.add_token_list(tokens)
  writer.add_token_types([2, 3, 3, 1, 1, 1])
  writer.add_token_merges(["a b"])
  writer.add_bos_token_id(1)
  writer.add_eos_token_id(2)
  writer.add_chat_template("{{ bos_token }}")
  rng = np.random.default_rng(0)
  shapes = {"token_embd.weight": (6, 8), "output_norm.weight": (8,)}
  shapes |= {f"blk.0.{name}.weight": shape for name, shape in {
      "attn_norm": (8,), "ffn_norm": (8,), "attn_q": (8, 8), "attn_k": (8, 8), "attn_v": (8, 8),
      "attn_output": (8, 8), "ffn_gate": (12, 8), "ffn_up": (12, 8), "ffn_down": (8, 12)}.items()}
  shapes |= {f"blk.0.attn_{part}.bias": (8,) for part in "qkv"}
  values = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
  for name, value in values.items():
    writer.add_tensor(name, value)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()

  target = tmp_path / "hf"
  result = convert(f"--source={tmp_path / 'm.gguf'}", f"--target={target}", "--dtype=bfloat16")
  assert result.returncode == 0, result.stderr
  tensors = load_file(target / "model.safetensors")
  k_proj = tensors["model.layers.0.self_attn.k_proj.weight"]
  assert k_proj.dtype == ml_dtypes.bfloat16 and len(tensors) == len(values)
  np.testing.assert_array_equal(k_proj, values["blk.0.attn_k.weight"].astype(k_proj.dtype))
  assert json.loads((target / "config.json").read_text())["architectures"] == ["Qwen2ForCausalLM"]
  assert json.loads((target / "tokenizer.json").read_text())["model"]["vocab"]["ab"] == 5
  settings = json.loads((target / "tokenizer_config.json").read_text())
  assert (settings["bos_token"], settings["eos_token"]) == ("<s>", "</s>")
  assert settings["chat_template"] == "{{ bos_token }}"
  assert json.loads((target / "generation_config.json").read_text()) == {"eos_token_id": [2]}


def test_faults_are_said_without_a_traceback(tmp_path):
  (tmp_path / "full").mkdir()
  (tmp_path / "full" / "file").write_text("keep me")
  result = convert(f"--source={tmp_path}", f"--target={tmp_path / 'full'}")
  assert result.returncode != 0 and "is not an empty folder" in result.stderr + result.stdout
  result = convert(f"--source={tmp_path / 'full'}", f"--target={tmp_path}", "--overwrite")
  assert result.returncode == 2 and "holds the source: name another" in result.stderr
  result = convert(f"--source={tmp_path}", f"--target={tmp_path / 'new'}")
  assert result.returncode != 0 and "neither a .gguf file" in result.stderr + result.stdout
  assert "Traceback" not in result.stderr and not (tmp_path / "new").exists()
