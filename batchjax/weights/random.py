"""Random parameters of a known shape, made on their devices."""

import zlib
from typing import Any

import jax
import jax.numpy as jnp

from batchjax.config import ModelConfig
from batchjax.weights.layout import Layout
from batchjax.weights.tree import in_first_layer, nest, param_shapes


def random_params(config: ModelConfig, seed: int,
                  mesh: jax.sharding.Mesh | None = None) -> dict[str, Any]:
  """Parameters drawn from (seed, parameter path) alone, in `config.dtype`, laid out for `mesh`.

  Matrices keep the variance of their input, those that write to the residual
  stream divide it by twice the number of layers (Radford et al. 2019, section
  2.3), norms start as the identity and embeddings give activations near 1.
  """
  params, layout = {}, Layout(config, mesh)
  for path, shape in param_shapes(config).items():
    mean, std = _moments(config, path)
    key = jax.random.fold_in(jax.random.key(seed), zlib.crc32(path.encode()))
    # Parameters of one shape and sharding share a program: jit knows it by `_draw`.
    # So they do on a mesh, by the path in the first layer.
    draw_fn = jax.jit(_draw, static_argnames=("shape", "dtype", "layout", "path"),
                      out_shardings=layout.sharding(path))
    params[path] = draw_fn(key, mean, std, shape=shape, dtype=config.dtype,
                           layout=None if mesh is None else layout,
                           path="" if mesh is None else in_first_layer(path))
  return nest(params)


def _moments(config: ModelConfig, path: str) -> tuple[float, float]:
  residual = (2 * config.num_layers) ** -0.5
  match path.split("/")[-1]:
    case "scale":
      return float(not config.norm_plus_one), 0.0
    case "qkv" | "gate_up" | "kernel":
      return 0.0, config.hidden_size ** -0.5
    case "qkv_bias":
      return 0.0, 0.1
    case "out":
      return 0.0, residual * (config.num_heads * config.head_dim) ** -0.5
    case "down":
      return 0.0, residual * config.ffn_size ** -0.5
    case "embedding":
      # A tied table is the output projection too, which sets its scale.
      return 0.0, config.hidden_size ** -0.5 if config.tie_embeddings else 1 / config.embed_scale
  raise ValueError(f"no scale is known for the parameter {path}")


def _draw(key: jax.Array, mean: jax.typing.ArrayLike, std: jax.typing.ArrayLike,
          shape: tuple[int, ...], dtype: str, layout: Layout | None, path: str) -> jax.Array:
  def draw(key, mean, std):
    return (mean + std * jax.random.normal(key, shape)).astype(jnp.dtype(dtype))

  return draw(key, mean, std) if layout is None else layout.keep(path, draw, key, mean, std)
