"""Hugging Face folders: bit-exact round trips, shards, dtypes, and what is refused."""

import dataclasses
import json
import pathlib
import shutil

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from batchjax import models, weights
from batchjax.config import ConfigError, ModelSource

GOLDENS = pathlib.Path(__file__).parents[1] / "goldens"
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3")


@pytest.fixture
def folder(tmp_path):
  """A copy of the Llama golden that a test may change."""
  shutil.copytree(GOLDENS / "llama", tmp_path / "llama")
  return tmp_path / "llama"


def edit_config(folder, **changes):
  config = json.loads((folder / "config.json").read_text())
  (folder / "config.json").write_text(json.dumps(config | changes))


def edit_tensors(folder, edit):
  tensors = load_file(folder / "model.safetensors")
  edit(tensors)
  save_file(tensors, folder / "model.safetensors")


def load(folder, dtype="float16"):
  return weights.load_model(ModelSource(str(folder), dtype=dtype))


def assert_equal(a, b):
  assert jax.tree.structure(a) == jax.tree.structure(b)
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)):
    assert x.dtype == y.dtype
    np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("max_shard_bytes", [1 << 30, 6_000])
def test_round_trip_is_bit_exact(family, max_shard_bytes, tmp_path):
  model = load(GOLDENS / family)
  config = weights.load_hf_config(ModelSource(str(GOLDENS / family)))
  weights.save_hf(str(tmp_path), model, config, max_shard_bytes)
  stored = load_file(GOLDENS / family / "model.safetensors")
  files = sorted(tmp_path.glob("*.safetensors"))
  written = {}
  for file in files:
    written |= load_file(file)
  assert (len(files) == 1) == (max_shard_bytes == 1 << 30)
  assert written.keys() == stored.keys()
  for name in stored:
    assert written[name].dtype == np.float16
    np.testing.assert_array_equal(written[name], stored[name], err_msg=name)
  again = load(tmp_path)
  assert again.config == model.config
  assert_equal(again.params, model.params)
  assert not list(tmp_path.glob("*.tmp"))


def test_index_lists_every_tensor_and_its_bytes(tmp_path):
  model = load(GOLDENS / "llama")
  weights.save_hf(str(tmp_path), model, weights.load_hf_config(ModelSource(str(GOLDENS / "llama"))),
                  max_shard_bytes=6_000)
  index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
  assert index["metadata"]["total_size"] == sum(x.nbytes for x in jax.tree.leaves(model.params))
  for name, file in index["weight_map"].items():
    assert name in load_file(tmp_path / file)


def test_fused_parameters_hold_q_k_v_and_gate_up_in_order():
  c = weights.load_config(ModelSource(str(GOLDENS / "llama")))
  stored = load_file(GOLDENS / "llama" / "model.safetensors")
  layer = load(GOLDENS / "llama").params["params"]["layers_1"]
  group, h = c.num_heads // c.num_kv_heads, c.head_dim
  prefix = "model.layers.1."
  qkv = layer["attn"]["qkv"].reshape(c.hidden_size, c.num_kv_heads, group + 2, h)
  for k in range(c.num_kv_heads):
    for g in range(group):
      head = slice((k * group + g) * h, (k * group + g + 1) * h)
      np.testing.assert_array_equal(qkv[:, k, g],
                                    stored[prefix + "self_attn.q_proj.weight"][head].T)
      np.testing.assert_array_equal(layer["attn"]["out"][k, g],
                                    stored[prefix + "self_attn.o_proj.weight"][:, head].T)
    for j, name in ((group, "k_proj"), (group + 1, "v_proj")):
      np.testing.assert_array_equal(
          qkv[:, k, j], stored[f"{prefix}self_attn.{name}.weight"][k * h:(k + 1) * h].T)
  for part, name in ((0, "gate_proj"), (1, "up_proj")):
    np.testing.assert_array_equal(np.split(layer["ffn"]["gate_up"], 2, axis=1)[part],
                                  stored[f"{prefix}mlp.{name}.weight"].T)


def test_biases_are_fused_per_kv_head():
  c = weights.load_config(ModelSource(str(GOLDENS / "qwen2")))
  stored = load_file(GOLDENS / "qwen2" / "model.safetensors")
  bias = load(GOLDENS / "qwen2").params["params"]["layers_0"]["attn"]["qkv_bias"]
  for j, name in ((-2, "k_proj"), (-1, "v_proj")):
    np.testing.assert_array_equal(bias[:, j].reshape(-1),
                                  stored[f"model.layers.0.self_attn.{name}.bias"])
  np.testing.assert_array_equal(bias[:, :-2].reshape(c.num_heads, c.head_dim).reshape(-1),
                                stored["model.layers.0.self_attn.q_proj.bias"])


@pytest.mark.parametrize("stored", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("wanted", ["float32", "float16", "bfloat16"])
def test_tensors_are_cast_to_the_wanted_dtype(stored, wanted, folder):
  edit_tensors(folder, lambda t: t.update({k: v.astype(stored) for k, v in t.items()}))
  model = load(folder, wanted)
  down = model.params["params"]["layers_0"]["ffn"]["down"]
  expected = load_file(folder / "model.safetensors")["model.layers.0.mlp.down_proj.weight"]
  assert {str(x.dtype) for x in jax.tree.leaves(model.params)} == {wanted}
  assert model.config.dtype == wanted
  np.testing.assert_array_equal(np.asarray(down), expected.T.astype(down.dtype))
  assert weights.stored_dtype(ModelSource(str(folder))) == np.dtype(stored).name


def test_mixed_dtypes_are_stored_in_float32(folder):
  edit_tensors(folder, lambda t: t.update(
      {"model.norm.weight": t["model.norm.weight"].astype(ml_dtypes.bfloat16)}))
  assert weights.stored_dtype(ModelSource(str(folder))) == "float32"


def test_a_value_beyond_float16_is_an_error(folder):
  def edit(tensors):
    tensors["model.norm.weight"] = tensors["model.norm.weight"].astype(np.float32)
    tensors["model.norm.weight"][0] = 1e6
  edit_tensors(folder, edit)
  with pytest.raises(weights.WeightError, match=r"model\.norm\.weight exceeds .* float16"):
    load(folder, "float16")
  assert load(folder, "bfloat16").config.dtype == "bfloat16"


def test_generation_config_widens_the_end_tokens(folder):
  (folder / "generation_config.json").write_text('{"eos_token_id": 7}')
  assert weights.load_config(ModelSource(str(folder))).eos_token_ids == (2, 3, 7)
  (folder / "generation_config.json").write_text('{"eos_token_id": [3, 9]}')
  assert weights.load_config(ModelSource(str(folder))).eos_token_ids == (2, 3, 9)
  (folder / "generation_config.json").write_text("{}")
  assert weights.load_config(ModelSource(str(folder))).eos_token_ids == (2, 3)


def test_config_needs_no_weights(folder):
  (folder / "model.safetensors").unlink()
  assert weights.load_config(ModelSource(str(folder), dtype="bfloat16")).dtype == "bfloat16"
  with pytest.raises(weights.WeightError, match="neither model.safetensors nor"):
    load(folder)


@pytest.mark.parametrize("name,shape", [
    ("model.layers.1.self_attn.k_proj.weight", r"\(32, 32\)"), ("model.norm.weight", r"\(32,\)"),
    ("lm_head.weight", r"\(128, 32\)")])
def test_a_missing_tensor_is_named(name, shape, folder):
  edit_tensors(folder, lambda t: t.pop(name))
  with pytest.raises(weights.WeightError, match=f"llama.*lacks the tensor {name}.*{shape}"):
    load(folder)


def test_a_superfluous_tensor_is_named(folder):
  name = "model.layers.0.self_attn.q_proj.bias"
  edit_tensors(folder, lambda t: t.update({name: np.zeros(3, np.float16)}))
  with pytest.raises(weights.WeightError, match=rf"model\.safetensors: {name}, of shape \(3,\)"):
    load(folder)


def test_a_wrong_shape_is_named_before_anything_is_read(folder):
  name = "model.layers.0.mlp.gate_proj.weight"
  edit_tensors(folder, lambda t: t.update({name: np.ascontiguousarray(t[name].T)}))
  with pytest.raises(weights.WeightError,
                     match=rf"{name} has shape \(32, 48\), expected \(48, 32\)"):
    load(folder)


def test_quantised_tensors_are_refused(folder):
  name = "model.layers.0.mlp.gate_proj.weight"
  edit_tensors(folder, lambda t: t.update({name: t[name].astype(np.int8)}))
  with pytest.raises(weights.WeightError, match=f"{name} is stored as I8"):
    load(folder)


def test_a_file_cut_short_is_named(folder):
  file = folder / "model.safetensors"
  file.write_bytes(file.read_bytes()[:-100])
  with pytest.raises(ConfigError, match=r"model\.safetensors is damaged or incomplete"):
    load(folder)


def test_computed_buffers_and_the_copy_of_a_tied_head_are_ignored(tmp_path):
  shutil.copytree(GOLDENS / "qwen3", tmp_path / "qwen3")
  plain = load(tmp_path / "qwen3")
  assert plain.config.tie_embeddings

  def edit(tensors):
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.zeros(4, np.float32)
  edit_tensors(tmp_path / "qwen3", edit)
  assert_equal(load(tmp_path / "qwen3").params, plain.params)


def test_an_absent_shard_is_named(tmp_path):
  model = load(GOLDENS / "llama")
  weights.save_hf(str(tmp_path), model, weights.load_hf_config(ModelSource(str(GOLDENS / "llama"))),
                  max_shard_bytes=20_000)
  shard = sorted(tmp_path.glob("*.safetensors"))[1]
  tensors = load_file(shard)
  name = sorted(tensors)[0]
  save_file({k: v for k, v in tensors.items() if k != name}, shard)
  with pytest.raises(weights.WeightError, match=f"{shard.name}: lacks the tensor {name}"):
    load(tmp_path)
  shard.unlink()
  with pytest.raises(weights.WeightError, match=f"names {shard.name}, which is not"):
    load(tmp_path)


@pytest.fixture
def sharded(tmp_path):
  """The Llama golden in shards of a few tensors."""
  weights.save_hf(str(tmp_path), load(GOLDENS / "llama"),
                  weights.load_hf_config(ModelSource(str(GOLDENS / "llama"))), max_shard_bytes=20_000)
  return tmp_path


def edit_index(folder, edit):
  path = folder / "model.safetensors.index.json"
  index = json.loads(path.read_text())
  edit(index["weight_map"])
  path.write_text(json.dumps(index))


def test_the_index_decides_where_a_tensor_is_read(sharded, caplog):
  plain = load(GOLDENS / "llama")
  name = "model.norm.weight"
  others = [shard for shard in sorted(sharded.glob("*.safetensors")) if name not in load_file(shard)]
  for shard in others:  # stale copies
    save_file(load_file(shard) | {name: np.full(32, 7, np.float16)}, shard)
  assert_equal(load(sharded).params, plain.params)
  assert len(caplog.records) == 1 and f"{name} in {others[0].name}, {name} in" in caplog.text
  assert "elsewhere or nowhere: these copies are not read" in caplog.text
  edit_index(sharded, lambda placed: placed.update({name: others[-1].name}))
  assert (load(sharded).params["params"]["final_norm"]["scale"] == 7).all()
  assert weights.stored_dtype(ModelSource(str(sharded))) == "float16"


def test_a_stale_tensor_may_be_of_any_kind(sharded):
  shard = sorted(sharded.glob("*.safetensors"))[0]
  save_file(load_file(shard) | {"old.q": np.zeros((3, 3), np.int8)}, shard)
  assert_equal(load(sharded).params, load(GOLDENS / "llama").params)
  assert weights.stored_dtype(ModelSource(str(sharded))) == "float16"


def test_a_tensor_that_the_index_leaves_out_is_missing(sharded, caplog):
  edit_index(sharded, lambda placed: placed.pop("model.norm.weight"))
  with pytest.raises(weights.WeightError, match=r"lacks the tensor model\.norm\.weight.*fetch the model"):
    load(sharded)
  assert "model.norm.weight in model-0" in caplog.text


def test_an_index_beside_a_single_file_decides_too(sharded, caplog):
  shutil.copy(GOLDENS / "llama" / "model.safetensors", sharded)
  edit_tensors(sharded, lambda t: t.update({k: v + 1 for k, v in t.items()}))
  assert_equal(load(sharded).params, load(GOLDENS / "llama").params)
  assert len(caplog.records) == 1
  assert "in model.safetensors and " in caplog.text and "these copies are not read" in caplog.text


def test_an_index_may_name_a_single_file(folder):
  names = load_file(folder / "model.safetensors")
  (folder / "model.safetensors.index.json").write_text(json.dumps(
      {"weight_map": dict.fromkeys(names, "model.safetensors")}))
  assert_equal(load(folder).params, load(GOLDENS / "llama").params)


def test_shards_without_an_index_are_refused(sharded):
  (sharded / "model.safetensors.index.json").unlink()
  with pytest.raises(weights.WeightError, match="neither model.safetensors nor model.safetensors.index"):
    load(sharded)


@pytest.mark.parametrize("content, message", [
    ("{", "index.json is not JSON"), ("[]", "holds a list"), ("{}", "weight_map must be .* got NoneType"),
    ('{"weight_map": []}', "got list"), ('{"weight_map": {}}', "weight_map must be an object"),
    *((json.dumps({"weight_map": {"model.norm.weight": file}}), message) for file, message in (
        ("../x.safetensors", "places model.norm.weight in '../x.safetensors', which is no file of this"),
        ("/etc/passwd", "in '/etc/passwd', which is no file of this folder"), ("", "in '', which is no"),
        ("a/../../x", "which is no file of this folder: fetch the index again"), (3, "in 3, which is no"),
        (None, "in None, which"), ("gone.safetensors", "names gone.safetensors, which is not in the"),
        ("config.json", "config.json is damaged or incomplete"))),
])
def test_a_wrong_index_is_one_line(content, message, sharded):
  (sharded / "model.safetensors.index.json").write_text(content)
  for read in (load, lambda folder: weights.stored_dtype(ModelSource(str(folder)))):
    with pytest.raises(ConfigError, match=message) as error:
      read(sharded)
    assert "\n" not in str(error.value) and str(sharded) in str(error.value)


def header(text, size=None):
  data = text if isinstance(text, bytes) else json.dumps(text).encode()
  return (len(data) if size is None else size).to_bytes(8, "little") + data


TENSOR = {"dtype": "F16", "shape": [4], "data_offsets": [0, 8]}


@pytest.mark.parametrize("data", [
    b"", b"\0" * 7, header(b"{", 2**63), header(b"{", 2**30), header(b"{}", 3), header(b"[]"),
    header(b"\xff"), header({"x": TENSOR}), header({"x": TENSOR | {"dtype": "F9"}}) + bytes(8),
    header({"x": TENSOR | {"shape": [5]}}) + bytes(8), header({"x": TENSOR | {"shape": [2**63, 4]}}),
    header({"x": TENSOR, "y": TENSOR}) + bytes(8), header({"x": TENSOR}) + bytes(99),
    header({"x": TENSOR | {"data_offsets": [8, 0]}}) + bytes(8)], ids=str)
def test_a_damaged_safetensors_header_is_one_line(data, folder):
  (folder / "model.safetensors").write_bytes(data)
  with pytest.raises(ConfigError, match=r"model\.safetensors is damaged or incomplete \(") as error:
    load(folder)
  assert "\n" not in str(error.value)


def test_quantised_tensors_have_no_stored_dtype(folder):
  edit_tensors(folder, lambda t: t.update({"model.norm.weight": np.zeros(32, np.int8)}))
  with pytest.raises(weights.WeightError, match="model.norm.weight is stored as I8; supported"):
    weights.stored_dtype(ModelSource(str(folder)))


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
@pytest.mark.parametrize("value", ["2", [2, "3"], [[2]], 2.5, -1, True, {"a": 1}], ids=str)
def test_wrong_end_tokens_are_named(name, value, folder):
  (folder / "generation_config.json").write_text("{}")
  values = json.loads((folder / name).read_text())
  (folder / name).write_text(json.dumps(values | {"eos_token_id": value}))
  with pytest.raises(ConfigError, match=rf"{name}: eos_token_id=.* must be a token id or a list"):
    weights.load_config(ModelSource(str(folder)))


def test_errors_of_a_setting_name_the_folder(folder):
  edit_config(folder, num_hidden_layers=2**31)
  with pytest.raises(ConfigError, match=r"llama: config\.json: num_hidden_layers=2147483648 must be an "
                     "integer from 1 to 10000: fetch the file again"):
    weights.load_config(ModelSource(str(folder)))


def test_an_unknown_family_or_path_is_named(folder, tmp_path):
  edit_config(folder, model_type="rwkv")
  with pytest.raises(ConfigError, match="'rwkv' is unknown; known:.*llama"):
    weights.load_config(ModelSource(str(folder)))
  with pytest.raises(ConfigError, match="neither a .gguf file nor a folder"):
    weights.load_config(ModelSource(str(tmp_path)))


def test_save_refuses_the_config_of_another_model(tmp_path):
  with pytest.raises(ConfigError, match="describes"):
    weights.save_hf(str(tmp_path), load(GOLDENS / "llama"),
                    weights.load_hf_config(ModelSource(str(GOLDENS / "qwen3"))))
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("shape", [name for name in models.SHAPES if name.startswith("tiny")])
def test_the_tree_is_that_of_the_module(shape):
  """The loaders' shapes against those that Flax makes of the model itself."""
  config = models.SHAPES[shape]
  made = jax.eval_shape(lambda key: models.init_params(config, key), jax.random.key(0))
  made = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf.shape
          for path, leaf in jax.tree_util.tree_flatten_with_path(made)[0]}
  made = {path.removeprefix("params/").removesuffix("/value"): s for path, s in made.items()}
  assert made == weights.param_shapes(config)


@pytest.mark.parametrize("shape", [name for name in models.SHAPES if name.startswith("tiny")])
def test_the_name_map_fills_every_element_once(shape):
  config = dataclasses.replace(models.SHAPES[shape], dtype="float32")
  counts = {path: np.zeros(s, int) for path, s in weights.param_shapes(config).items()}
  for target in models.name_map(config).values():
    buffer = counts["/".join(target.path)]
    part = target.part_of(buffer)
    part += target.arrange(np.ones(target.shape, int))
  assert all((count == 1).all() for count in counts.values())
