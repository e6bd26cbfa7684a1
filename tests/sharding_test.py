"""Who holds which tokens, and which meshes there can be."""

import jax
import numpy as np
import pytest

from batchjax.config import ConfigError, MeshConfig, VOCAB_SEGMENTS
from batchjax.models import SHAPES
from batchjax.sharding import make_mesh, resolve, Split


@pytest.mark.parametrize("vocab_size", [1, 29, 48, 256, 1000])
@pytest.mark.parametrize("num_devices", [2, 3, 5, 8, 64])
def test_every_token_has_one_place_in_rising_order(vocab_size, num_devices):
  split = Split(num_devices, vocab_size)
  num_places = split.num_segments * -(-vocab_size // VOCAB_SEGMENTS)
  held = [split.token_ids(np.arange(num_places), device) for device in range(num_devices)]
  tokens = np.concatenate(held)
  assert sorted(tokens[tokens < vocab_size]) == list(range(vocab_size))
  for device, ids in enumerate(held):
    ids = ids[ids < vocab_size]
    assert (np.diff(ids) > 0).all()
    assert (ids % VOCAB_SEGMENTS // split.num_segments == device).all()  # whole segments


def test_places_undo_token_ids():
  mesh = make_mesh(MeshConfig(5))
  split = Split(5, 100)
  num_places = split.num_segments * -(-100 // VOCAB_SEGMENTS)
  tokens = np.arange(-1, 100)

  def places(tokens):
    return split.places(tokens)[None]

  spec = jax.sharding.PartitionSpec
  found = np.asarray(jax.jit(jax.shard_map(places, mesh=mesh, in_specs=spec(),
                                           out_specs=spec("tensor")))(tokens))
  for device, row in enumerate(found):
    here = row < num_places
    np.testing.assert_array_equal(split.token_ids(row[here], device), tokens[here])
    assert (row[~here] == num_places).all()
  assert (found < num_places).sum(axis=0).tolist() == [0] + [1] * 100


def test_a_mesh_is_no_larger_than_the_machine():
  assert resolve(MeshConfig(0)).tensor == jax.local_device_count() == 8
  assert make_mesh(MeshConfig(1)) is None and make_mesh(MeshConfig(3)).size == 3
  with pytest.raises(ConfigError, match="engine.mesh.tensor=9 needs as many devices, JAX finds 8"):
    make_mesh(MeshConfig(9))


def test_shares_of_a_model():
  llama = SHAPES["llama3_8b"]  # 32 query heads on 8 KV heads
  assert llama.of_device(1) is llama
  shape = lambda config: (config.num_heads, config.num_kv_heads, config.ffn_size, config.vocab_size)
  assert shape(llama.of_device(4)) == (8, 2, 3584, 32_064)
  assert shape(llama.of_device(16)) == (2, 1, 896, 8016)
  assert shape(SHAPES["smollm2_135m"].of_device(3)) == (3, 1, 512, 16_384)
  with pytest.raises(ConfigError, match="tensor=12 does not divide the 32 query heads on 8 KV heads "
                                        "of the model; these sizes would do: 1, 2, 4, 8, 16, 32"):
    llama.of_device(12)
