"""Offline batched LLM inference on JAX: shared prefixes are computed once and read once."""

from batchjax.config import (ConfigError, EngineConfig, JobConfig, MeshConfig, ModelConfig,
                             ModelSource, from_config_dict, to_config_dict)
from batchjax.engine.pack import pack
from batchjax.engine.sampling import sample
from batchjax.engine.sampling_inputs import SamplingFeatures
from batchjax.engine.step import decode_loop, mixed_step
from batchjax.engine.step_cache import compiled_steps
from batchjax.generation import generate
from batchjax.jobs.run import run
from batchjax.models import Transformer
from batchjax.plan.planner import make_plan
from batchjax.plan.prefix_tree import build_prefix_tree
from batchjax.scoring import Score, ScoreRequest, score
from batchjax.text.tokenizer import load_tokenizer
from batchjax.types import Choice, Completion, Request, SamplingParams
from batchjax.weights import Model, load_model
