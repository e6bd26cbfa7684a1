"""Settings: frozen dataclasses, validated once, built from `ml_collections` configs."""

import dataclasses
import math
import types
import typing
from typing import Any, Literal, TypeVar

import ml_collections

from batchjax.types import SamplingParams

T = TypeVar("T")

# The vocabulary is dealt out to this many segments, token id modulo their number, and a device of a
# mesh holds whole ones: sums over it are made segment by segment, so they are the same on any mesh.
VOCAB_SEGMENTS = 48


class ConfigError(ValueError):
  """A setting is unknown, of the wrong type or out of range; the message names it.

  >>> batchjax.EngineConfig(page_size=12)
  Traceback (most recent call last):
  ...
  batchjax.config.ConfigError: engine.page_size=12 must be a power of two
  """


def _require(holds: bool, message: str) -> None:
  if not holds:
    raise ConfigError(message)


@dataclasses.dataclass(frozen=True)
class RopeScaling:
  """How rotary frequencies stretch past the trained context.

  `llama3` keeps high frequencies, divides low ones by `factor` and blends
  between (Llama 3.1, `rope_type: llama3`); `linear` divides all by `factor`.
  """

  kind: Literal["llama3", "linear"]
  factor: float
  low_freq_factor: float = 1.0
  high_freq_factor: float = 4.0
  original_max_len: int = 8192


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """A decoder-only transformer; families differ only in these fields.

  Attributes:
    family: which name map loads its weights ("llama", "mistral", "qwen2", ...).
    layer_kinds: "global" or "local" (sliding window) for each layer.
    sliding_window: a local layer's token sees itself and the window-1 tokens before.
    rope_local_theta: rope base of local layers, where it differs (Gemma 3).
    norm_plus_one: RMSNorm multiplies by 1 + weight (Gemma).
    post_norms, embed_scale: norms after attention and feed-forward too, factor of embeddings (Gemma).
    query_scale: multiplies q before the dot product; None is head_dim ** -0.5.
    eos_token_ids: tokens that end a sample unless `ignore_eos`.
    dtype: of parameters, activations and KV: "float32", "bfloat16" or "float16".

  >>> f'{batchjax.SHAPES["llama3_8b"].num_params:,}'
  '8,029,995,008'
  """

  family: str
  vocab_size: int
  hidden_size: int
  ffn_size: int
  num_layers: int
  num_heads: int
  num_kv_heads: int
  head_dim: int
  max_len: int
  norm_eps: float = 1e-5
  rope_theta: float = 10_000.0
  rope_local_theta: float | None = None
  rope_scaling: RopeScaling | None = None
  tie_embeddings: bool = False
  activation: Literal["silu", "gelu_tanh"] = "silu"
  qkv_bias: bool = False
  qk_norm: bool = False
  post_norms: bool = False
  norm_plus_one: bool = False
  embed_scale: float = 1.0
  query_scale: float | None = None
  attn_soft_cap: float | None = None
  final_soft_cap: float | None = None
  sliding_window: int | None = None
  layer_kinds: tuple[str, ...] = ()
  bos_token_id: int | None = None
  eos_token_ids: tuple[int, ...] = ()
  dtype: Literal["float32", "bfloat16", "float16"] = "float32"

  def __post_init__(self):
    _require(self.num_layers <= 10_000, f"model.num_layers must be at most 10000, got {self.num_layers}")
    if not self.layer_kinds:
      object.__setattr__(self, "layer_kinds", ("global",) * self.num_layers)
    for name in ("vocab_size", "hidden_size", "ffn_size", "num_layers", "num_heads", "num_kv_heads",
                 "head_dim", "max_len"):
      _require(0 < getattr(self, name) < 2**31,
               f"model.{name} must be positive and below 2**31, got {getattr(self, name)}")
    _require(self.num_heads % self.num_kv_heads == 0,
             f"model.num_heads={self.num_heads} is not a multiple of num_kv_heads={self.num_kv_heads}")
    _require(len(self.layer_kinds) == self.num_layers and set(self.layer_kinds) <= {"global", "local"},
             "model.layer_kinds needs 'global' or 'local' for each of num_layers layers")
    _require("local" not in self.layer_kinds or bool(self.sliding_window),
             "model.sliding_window must be set when a layer is local")

  def kv_width(self, lanes: int) -> int:
    """Last axis of a KV pool: a key and a value, filled up to a multiple of `lanes`."""
    return -(-2 * self.head_dim // lanes) * lanes

  def kv_bytes_per_token(self, lanes: int) -> int:
    """Bytes that one token takes in the KV pools of all layers."""
    itemsize = 4 if self.dtype == "float32" else 2
    return self.num_layers * self.num_kv_heads * self.kv_width(lanes) * itemsize

  def of_device(self, num_devices: int) -> "ModelConfig":
    """The shapes of what one of `num_devices` holds.

    Query heads divide. Where there are fewer KV heads than devices, each stands on several, its
    query heads split among them. Feed-forward and vocabulary are filled up to equal shares.

    Raises:
      ConfigError: heads do not divide; the message names the sizes that would do.
    """
    if num_devices == 1:
      return self
    heads, kv_heads = self.num_heads, self.num_kv_heads
    sizes = [n for n in range(1, heads + 1) if not heads % n and not (kv_heads % n and n % kv_heads)]
    _require(num_devices in sizes,
             f"engine.mesh.tensor={num_devices} does not divide the {heads} query heads on {kv_heads} KV "
             f"heads of the model; these sizes would do: {', '.join(map(str, sizes))}")
    segments = -(-VOCAB_SEGMENTS // num_devices) * -(-self.vocab_size // VOCAB_SEGMENTS)
    return dataclasses.replace(
        self, num_heads=heads // num_devices, num_kv_heads=max(1, kv_heads // num_devices),
        ffn_size=-(-self.ffn_size // num_devices), vocab_size=segments)

  @property
  def num_params(self) -> int:
    """Parameters, norms left out."""
    attn = self.hidden_size * self.head_dim * (2 * self.num_heads + 2 * self.num_kv_heads)
    per_layer = attn + 3 * self.hidden_size * self.ffn_size
    embeddings = self.vocab_size * self.hidden_size * (1 if self.tie_embeddings else 2)
    return self.num_layers * per_layer + embeddings


@dataclasses.dataclass(frozen=True)
class MeshConfig:
  """The devices that share one model.

  Attributes:
    tensor: devices that split heads, feed-forward, vocabulary and KV; 0 takes all of this machine.

  >>> batchjax.EngineConfig(mesh=batchjax.MeshConfig(tensor=4)).mesh
  MeshConfig(tensor=4)
  """

  tensor: int = 1

  def __post_init__(self):
    _require(self.tensor >= 0, f"engine.mesh.tensor must be at least 0, got {self.tensor}")


@dataclasses.dataclass(frozen=True)
class EngineConfig:
  """How the engine runs a job.

  Attributes:
    max_rows: most samples decoded at once.
    max_step_tokens: most tokens of a mixed step.
    page_size: tokens of a KV page.
    kv_lanes: the pool's last axis is filled up to a multiple of it; the job raises it to the chip's own.
    num_pages: pages of the KV pool; 0 takes `kv_memory_bytes`.
    kv_memory_bytes: of the KV pool when `num_pages` is 0; 0 takes what weights and the largest step leave of
      the device's memory (`plan.memory.settle`), 1 GiB on a CPU.
    max_decode_steps: most iterations of one decode loop.
    lookahead: dispatches in flight before the oldest one's results are read.
    max_levels: most shared tree levels above a row's own KV.
    share_prefixes: False computes and stores every prompt by itself.
    max_buckets: most compiled shapes of mixed steps, and of decode loops.
    compile_secs: what one more compiled shape is taken to cost.
    first_compile_secs: what compiling any is taken to cost beside that, where shapes compile side by side.
    plan_window: requests planned at a time; bounds host memory.
    attention: implementation of shared_prefix_attention; None picks by device.
    compilation_cache_dir: folder that keeps compiled steps for later processes; "" keeps none.
    compilation_cache_bytes: the steps not used for longest go when it holds more.
    mesh: the devices; sizes and bytes above are those of each of them.

  >>> dataclasses.replace(batchjax.EngineConfig(max_rows=256), share_prefixes=False).max_rows
  256
  """

  max_rows: int = 64
  max_step_tokens: int = 1024
  page_size: int = 16
  kv_lanes: int = 1
  num_pages: int = 0
  kv_memory_bytes: int = 0
  max_decode_steps: int = 16
  lookahead: int = 2
  max_levels: int = 4
  share_prefixes: bool = True
  max_buckets: int = 4
  compile_secs: float = 10.0
  first_compile_secs: float = 0.0
  plan_window: int = 100_000
  attention: str | None = None
  compilation_cache_dir: str = "~/.cache/batchjax"
  compilation_cache_bytes: int = 4 << 30
  mesh: MeshConfig = MeshConfig()

  def __post_init__(self):
    for name in ("max_rows", "max_step_tokens", "page_size", "kv_lanes", "max_decode_steps", "max_buckets",
                 "plan_window", "max_levels"):
      _require(getattr(self, name) > 0, f"engine.{name} must be positive, got {getattr(self, name)}")
    _require(self.lookahead >= 0, f"engine.lookahead must be at least 0, got {self.lookahead}")
    _require(self.max_step_tokens >= self.max_rows, f"engine.max_step_tokens={self.max_step_tokens} must be at "
             f"least max_rows={self.max_rows}: a mixed step holds one token of every running row")
    _require(not self.page_size & (self.page_size - 1), f"engine.page_size={self.page_size} must be a power of two")
    for name in ("num_pages", "kv_memory_bytes"):
      _require(getattr(self, name) >= 0, f"engine.{name} must be at least 0, got {getattr(self, name)}")


@dataclasses.dataclass(frozen=True)
class ModelSource:
  """Where a model comes from.

  Attributes:
    path: a Hugging Face folder, a .gguf file, an Orbax checkpoint, or a name of the Hub: org/name,
      org/name@revision, org/name/file.gguf; "" with `random`.
    format: "auto" looks at the path.
    shape: name of a known shape for format "random" (`batchjax.models.SHAPES`).
    seed: of random weights.
    name: what requests call it in their `model` field; "" accepts any name.
    dtype: parameters, activations and KV are held in this type.
    tokenizer: path or name of the tokenizer where it is not beside the weights.
    split_special_tokens: names of special tokens in rows' prompts and messages are ordinary text,
      for rows that are not trusted; those that a chat template writes stay tokens.

  >>> source = batchjax.ModelSource(path=path, dtype="bfloat16")
  >>> batchjax.load_model(source).config.dtype
  'bfloat16'
  """

  path: str = ""
  format: Literal["auto", "hf", "gguf", "orbax", "random"] = "auto"
  shape: str = ""
  seed: int = 0
  name: str = ""
  dtype: Literal["float32", "bfloat16", "float16"] = "float32"
  tokenizer: str = ""
  split_special_tokens: bool = False

  def __post_init__(self):
    if self.format == "random":
      _require(bool(self.shape), "model.format='random' needs model.shape")
    else:
      _require(bool(self.path), "model.path is empty: name a Hugging Face folder, a .gguf file, an Orbax "
               "checkpoint or a name of the Hub (org/name), or set model.format='random' and model.shape")


@dataclasses.dataclass(frozen=True)
class RowLimits:
  """The most that a row may ask for; one that asks for more is an error row that names the limit.

  Attributes:
    max_line_bytes: of a line of a file, or a Parquet row.
    max_name_chars: of an id, or the name of a model or field.
    max_messages: of a chat.
    max_n: samples of a prompt.
    max_top_logprobs: alternatives per token.
    max_stop_strings: of a row.
    max_stop_chars: of one stop string.
    max_stop_token_ids: of a row.
    max_logit_bias: biased tokens of a row.
    max_stop_table_bytes: automata of all stop strings of the job; rows that do not fit are error rows.
    max_template_chars: of the prompt that the chat template makes, and of every value on the way.
    max_template_secs: processor time that the chat template takes.
  """

  max_line_bytes: int = 16 << 20
  max_name_chars: int = 1024
  max_messages: int = 10_000
  max_n: int = 10_000
  max_top_logprobs: int = 1000
  max_stop_strings: int = 1000
  max_stop_chars: int = 1024
  max_stop_token_ids: int = 4096
  max_logit_bias: int = 4096
  max_stop_table_bytes: int = 512 << 20
  max_template_chars: int = 8 << 20
  max_template_secs: float = 5.0

  def __post_init__(self):
    for name, value in dataclasses.asdict(self).items():
      _require(value > 0, f"limits.{name} must be positive, got {value}")


@dataclasses.dataclass(frozen=True)
class JobConfig:
  """One job: a model, how to run it, and what rows mean that leave settings out.

  Attributes:
    model: where the model comes from.
    engine: how it runs.
    sampling: defaults of sampling parameters that a row does not name.
    limits: what a row may ask for.
    chat_template: path of a jinja2 template that replaces the model's own; "" keeps that.
    strict: one bad row stops the job before it starts.
    seed: folded with the request id where a row gives no seed.

  >>> config = batchjax.JobConfig(batchjax.ModelSource(path=path),
  ...                             sampling=batchjax.SamplingParams(temperature=0.0, max_tokens=64))
  >>> config.engine.max_rows
  64
  """

  model: ModelSource
  engine: EngineConfig = EngineConfig()
  sampling: SamplingParams = SamplingParams()
  limits: RowLimits = RowLimits()
  chat_template: str = ""
  strict: bool = False
  seed: int = 0


def to_config_dict(config: Any) -> ml_collections.ConfigDict:
  """The dataclass as a ConfigDict whose fields absl flags can override.

  >>> values = batchjax.to_config_dict(batchjax.JobConfig(batchjax.ModelSource(path=path)))
  >>> values.engine.max_rows = 32
  >>> batchjax.from_config_dict(batchjax.JobConfig, values).engine.max_rows
  32
  """
  values = ml_collections.ConfigDict(dataclasses.asdict(config), sort_keys=False, convert_dict=True)
  _hold_places(values, type(config))
  return values


def _hold_places(values: ml_collections.ConfigDict, cls: type) -> None:
  """Tells the type of fields that are None, without which a flag could not set them."""
  for name, hint in typing.get_type_hints(cls).items():
    if dataclasses.is_dataclass(hint):
      _hold_places(values[name], hint)
    elif values[name] is None:
      kind = next(a for a in typing.get_args(hint) if a is not type(None))
      values[name] = ml_collections.config_dict.placeholder(kind)


def from_config_dict(cls: type[T], values: Any, where: str = "config") -> T:
  """Builds the frozen dataclass `cls`, recursively, from a ConfigDict or dict.

  Raises:
    ConfigError: a field is unknown, missing, of the wrong type or out of range.

  >>> batchjax.from_config_dict(batchjax.EngineConfig, {"max_rows": 8}).max_rows
  8
  """
  _require(hasattr(values, "keys"), f"{where} must hold named fields, got {values!r}")
  known = {f.name: f for f in dataclasses.fields(cls)}
  hints = typing.get_type_hints(cls)
  unknown = sorted(set(values) - set(known))
  _require(not unknown, f"{where} has unknown fields {unknown}; known: {sorted(known)}")
  missing = sorted(name for name, f in known.items()
                   if name not in values and f.default is f.default_factory is dataclasses.MISSING)
  _require(not missing, f"{where} lacks {missing}")
  fields = {name: _convert(hints[name], values[name], f"{where}.{name}") for name in values}
  try:
    return cls(**fields)
  except ValueError as e:
    raise e if isinstance(e, ConfigError) else ConfigError(f"{where}.{e}") from e


def _convert(hint: Any, value: Any, where: str) -> Any:
  origin, args = typing.get_origin(hint), typing.get_args(hint)
  if origin in (typing.Union, types.UnionType):
    if value is None:
      _require(type(None) in args, f"{where} may not be None")
      return None
    return _convert(next(a for a in args if a is not type(None)), value, where)
  if origin is Literal:
    _require(value in args, f"{where} must be one of {list(args)}, got {value!r}")
    return value
  if dataclasses.is_dataclass(hint):
    return from_config_dict(hint, value, where)
  if origin is tuple:
    _require(isinstance(value, (list, tuple)), f"{where} must be a list, got {value!r}")
    kinds = [args[0]] * len(value) if args[-1] is Ellipsis else args
    _require(len(kinds) == len(value), f"{where} must have {len(kinds)} entries, got {value!r}")
    return tuple(_convert(kind, v, f"{where}[{i}]") for i, (kind, v) in enumerate(zip(kinds, value)))
  if hint is float and isinstance(value, int) and not isinstance(value, bool):
    value = float(value) if abs(value) < 10**308 else math.inf
  _require(type(value) is hint, f"{where} must be {hint.__name__}, got {value!r}")
  _require(hint is not float or math.isfinite(value), f"{where} must be finite, got {value!r}")
  return value
