"""Compiles the steps of a plan for a device that is not here."""

import dataclasses
import functools

from flax import linen as nn
import jax

from batchjax.config import EngineConfig, ModelConfig
from batchjax.engine import compile as compile_lib
from batchjax.engine.sampling_inputs import SamplingFeatures
from batchjax.models import init_params, Transformer
from batchjax.plan.buckets import Bucket
from batchjax.plan.planner import Plan


def compile_absent(bucket: Bucket, plan: Plan, config: ModelConfig, engine: EngineConfig,
                   features: SamplingFeatures, device: jax.Device, attention: str
                   ) -> jax.stages.Compiled:
  """The executable that the engine would make of one of a plan's shapes.

  Args:
    bucket, plan: the shape, and the plan that it is of.
    config, engine, features: as in `generate`.
    device: of `jax.experimental.topologies`.
    attention: implementation of attention.

  Raises:
    jax.errors.JaxRuntimeError: RESOURCE_EXHAUSTED where it does not fit the device's memory.
  """
  on_device = functools.partial(jax.tree.map, lambda x: jax.ShapeDtypeStruct(
      x.shape, x.dtype, sharding=jax.sharding.SingleDeviceSharding(device)))
  max_rows = max(b.num_rows for b in plan.buckets)
  params = {"params": nn.unbox(jax.eval_shape(lambda: init_params(config, jax.random.key(0))))}
  state = jax.eval_shape(compile_lib.make_state_fn(config, engine, plan.num_pages, max_rows,
                                                   features))
  target = jax.sharding.AbstractDevice(device_kind=device.device_kind, num_cores=1,
                                       platform=device.platform)
  mesh = jax.sharding.AbstractMesh((1,), ("device",), abstract_device=target)
  with jax.sharding.use_abstract_mesh(mesh):  # tells kernels their target
    compiler = compile_lib.StepCompiler(
        Transformer(config, engine.page_size, attention, engine.max_levels), on_device(params),
        features, None, config, dataclasses.replace(engine, compilation_cache_dir=""), device)
    return compiler.lower(bucket, on_device(state)).compile(
        compile_lib.COMPILER_OPTIONS[device.platform])
