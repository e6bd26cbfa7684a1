"""Offline batched LLM inference on JAX: shared prefixes are computed once and read once."""

from etils import epy

__version__ = "0.1.0"

with epy.lazy_api_imports(globals()):  # so that `import batchjax` is quick, and its console script
  from batchjax.cache.kv_state import init_kv_state
  from batchjax.config import (ConfigError, EngineConfig, JobConfig, MeshConfig, ModelConfig, ModelSource,
                               from_config_dict, to_config_dict)
  from batchjax.engine.pack import pack
  from batchjax.engine.sampling import sample
  from batchjax.engine.sampling_inputs import pack_sampling, SamplingFeatures, SamplingTable
  from batchjax.engine.step import decode_loop, init_engine_state, mixed_step
  from batchjax.engine.step_cache import compiled_steps
  from batchjax.forward_pass import forward, ForwardOutputs
  from batchjax.generation import generate
  from batchjax.jobs.run import run
  from batchjax.models import SHAPES, Transformer
  from batchjax.plan.cost import CHIPS
  from batchjax.plan.planner import make_plan, make_scheduler
  from batchjax.plan.prefix_tree import build_prefix_tree
  from batchjax.scoring import Score, ScoreRequest, score
  from batchjax.text.tokenizer import load_tokenizer
  from batchjax.text_completion import complete, load, Loaded, TextChoice, TextCompletion
  from batchjax.types import Choice, Completion, Request, SamplingParams
  from batchjax.weights import Model, load_model

__all__ = (
    "CHIPS", "Choice", "Completion", "ConfigError", "EngineConfig", "ForwardOutputs", "JobConfig", "Loaded",
    "MeshConfig", "Model", "ModelConfig", "ModelSource", "Request", "SHAPES", "SamplingFeatures", "SamplingParams",
    "SamplingTable", "Score", "ScoreRequest", "TextChoice", "TextCompletion", "Transformer",
    "build_prefix_tree", "compiled_steps", "complete", "decode_loop", "forward", "from_config_dict",
    "generate", "init_engine_state", "init_kv_state", "load", "load_model", "load_tokenizer", "make_plan",
    "make_scheduler", "mixed_step", "pack", "pack_sampling", "run", "sample", "score", "to_config_dict")
