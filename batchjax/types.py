"""The values that travel between the stages of a job.

Legend of the dimension letters used in every shape annotation:

  T  flat tokens of a step        R  rows of a step (one row = one sample)
  S  segments of a step           I  entries of the flat page list
  A  pages in the KV pool         N  nodes of the prefix tree
  L  layers                       D  model width
  Q  query heads                  K  KV heads
  H  head dim                     F  feed-forward width
  V  vocabulary                   U  states of all stop automata

Host values are frozen dataclasses over numpy, complete at construction.
Values that cross to the device are NamedTuples of arrays. -1 is the only null.
"""

import dataclasses
import reprlib
from typing import Literal, NamedTuple

import numpy as np

FinishReason = Literal["stop", "length", "error"]


@dataclasses.dataclass(frozen=True)
class SamplingParams:
  """How the tokens of one request are drawn; the names are those of the OpenAI and vLLM APIs.

  Attributes:
    temperature: 0 is greedy.
    top_k: keep the k most likely tokens; -1 keeps all.
    top_p: keep the smallest set of most likely tokens whose mass reaches this.
    min_p: drop tokens less likely than this times the most likely one.
    n: samples drawn of the prompt; they share its whole KV.
    seed: every draw folds (seed, sample index, position), nothing else.
    max_tokens: most tokens generated per sample; 0, with `prompt_logprobs`, only scores.
    min_tokens: stop tokens are masked until this many are generated.
    stop: strings that end a sample; the text ends before the string.
    stop_token_ids: tokens that end a sample, beside the model's own.
    ignore_eos: the model's own end tokens do not end a sample.
    presence_penalty: subtracted from the logit of every token generated so far.
    frequency_penalty: subtracted once per time the token was generated so far.
    repetition_penalty: divides positive and multiplies negative logits of
      every token in the prompt or generated so far (CTRL, section 4.1).
    logit_bias: (token id, bias) pairs added to the logits.
    logprobs: return the log-probability of each generated token.
    top_logprobs: also return this many most likely alternatives per token.
    prompt_logprobs: also return them for the prompt ("echo").
    prompt_logprobs_start: of the prompt's tokens from this one on; the logits of those before are not
      computed. The first token has none in any case.

  >>> params = batchjax.SamplingParams(top_p=0.9, n=4, max_tokens=64, stop=("\\n\\n",))
  >>> batchjax.SamplingParams(top_p=2)
  Traceback (most recent call last):
  ...
  ValueError: top_p must be above 0 and at most 1, got 2.0
  """

  temperature: float = 1.0
  top_k: int = -1
  top_p: float = 1.0
  min_p: float = 0.0
  n: int = 1
  seed: int = 0
  max_tokens: int = 256
  min_tokens: int = 0
  stop: tuple[str, ...] = ()
  stop_token_ids: tuple[int, ...] = ()
  ignore_eos: bool = False
  presence_penalty: float = 0.0
  frequency_penalty: float = 0.0
  repetition_penalty: float = 1.0
  logit_bias: tuple[tuple[int, float], ...] = ()
  logprobs: bool = False
  top_logprobs: int = 0
  prompt_logprobs: bool = False
  prompt_logprobs_start: int = 0

  def __post_init__(self):
    """Raises ValueError, its message begins with the field's name, for a wrong type or range."""
    def check(name, holds, rule):
      if not holds:
        value = getattr(self, name)
        if type(value) is int and abs(value) >= 2**31 and "integer of" in rule:
          rule += ", below 2**31"
        raise ValueError(f"{name} must be {rule}, got {reprlib.repr(value)}")

    def is_int(value, low, high=2**31 - 1):
      is_integer = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
      return is_integer and low <= value <= high

    def is_float(value):  # bounded by what float32 holds, which no NaN satisfies
      is_number = isinstance(value, (int, float, np.integer, np.floating))
      return is_number and not isinstance(value, bool) and -3e38 < value < 3e38

    def is_tuple(name, holds):
      value = getattr(self, name)
      return isinstance(value, tuple) and all(map(holds, value))

    for name in ("temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty",
                 "repetition_penalty"):
      check(name, is_float(getattr(self, name)), "a finite number")
      object.__setattr__(self, name, float(getattr(self, name)))
    for name in ("ignore_eos", "logprobs", "prompt_logprobs"):
      check(name, isinstance(getattr(self, name), bool), "true or false")
    check("temperature", self.temperature >= 0, "at least 0")
    check("top_k", is_int(self.top_k, -1) and self.top_k != 0,
          "an integer of at least 1, or -1 to keep all tokens")
    check("top_p", 0 < self.top_p <= 1, "above 0 and at most 1")
    check("min_p", 0 <= self.min_p <= 1, "between 0 and 1")
    check("n", is_int(self.n, 1), "an integer of at least 1")
    check("seed", is_int(self.seed, 0, 2**32 - 1), "an integer between 0 and 4294967295")
    check("max_tokens", is_int(self.max_tokens, 0), "an integer of at least 0")
    check("max_tokens", self.max_tokens > 0 or self.prompt_logprobs,
          "at least 1, or 0 with prompt_logprobs to score a prompt")
    check("min_tokens", is_int(self.min_tokens, 0), "an integer of at least 0")
    check("min_tokens", self.min_tokens <= self.max_tokens,
          f"at most max_tokens={self.max_tokens}")
    check("stop", is_tuple("stop", lambda text: isinstance(text, str) and text != ""),
          "a tuple of non-empty strings")
    check("stop_token_ids", is_tuple("stop_token_ids", lambda token: is_int(token, 0)),
          "a tuple of integers of at least 0")
    check("presence_penalty", -2 <= self.presence_penalty <= 2, "between -2 and 2")
    check("frequency_penalty", -2 <= self.frequency_penalty <= 2, "between -2 and 2")
    check("repetition_penalty", self.repetition_penalty > 0, "above 0")
    check("logit_bias", is_tuple("logit_bias", lambda pair: isinstance(pair, tuple)
                                 and len(pair) == 2 and is_int(pair[0], 0) and is_float(pair[1])
                                 and -100 <= pair[1] <= 100),
          "a tuple of (token id, bias) pairs with biases between -100 and 100")
    check("logit_bias", len({token for token, _ in self.logit_bias}) == len(self.logit_bias),
          "given once per token id")
    check("top_logprobs", is_int(self.top_logprobs, 0), "an integer of at least 0")
    check("top_logprobs", not self.top_logprobs or self.logprobs or self.prompt_logprobs,
          "0 unless logprobs or prompt_logprobs is true")
    check("prompt_logprobs_start", is_int(self.prompt_logprobs_start, 0), "an integer of at least 0")


# Nothing is drawn: a prompt's log-probabilities, and the most likely token in each place.
SCORING = SamplingParams(temperature=0.0, max_tokens=0, ignore_eos=True, prompt_logprobs=True,
                         top_logprobs=1)


@dataclasses.dataclass(frozen=True)
class Request:
  """One prompt to complete.

  Attributes:
    request_id: unique within the job (`custom_id` of the file).
    prompt_token_ids: i32[prompt_len], at least one token; made of any sequence of integers.
    sampling_params: how to draw the completion.

  >>> request = batchjax.Request("a", tokenizer.encode("The end"), batchjax.SamplingParams(n=2))
  >>> request.prompt_token_ids.dtype
  dtype('int32')
  """

  request_id: str
  prompt_token_ids: np.ndarray
  sampling_params: SamplingParams = SamplingParams()

  def __post_init__(self):
    """Raises ValueError where the token ids are no sequence of 32-bit integers."""
    given = np.asarray(self.prompt_token_ids)
    is_integer = given.dtype.kind in "iu" or not given.size
    ids = given.astype(np.int32, copy=False) if is_integer else None
    if given.ndim != 1 or ids is None or (given != ids).any():
      raise ValueError(f"request {self.request_id!r}: prompt_token_ids must be a sequence of "
                       f"32-bit integers, got {reprlib.repr(self.prompt_token_ids)}")
    object.__setattr__(self, "prompt_token_ids", ids)


@dataclasses.dataclass(frozen=True)
class Choice:
  """One sample of a request.

  Attributes:
    index: which of the request's n samples.
    token_ids: i32[len]; a stop token that ended the sample is not included.
    finish_reason: "stop" (a stop token or string), "length", or "error": the model gave logits
      (or log-probabilities of the prompt) that are not finite; the tokens before them are here.
    logprobs: f32[len], or None when not asked for.
    top_token_ids: i32[len, top_logprobs], most likely first, or None.
    top_logprobs: f32[len, top_logprobs], or None.
    stop_token_id: the stop token that ended the sample, -1 where none did.

  >>> params = batchjax.SamplingParams(temperature=0.0, n=2, max_tokens=4)
  >>> completion, = batchjax.generate(model, [batchjax.Request("a", [7, 8, 9], params)])
  >>> choice = completion.choices[1]
  >>> choice.index, choice.finish_reason, len(choice.token_ids), choice.stop_token_id
  (1, 'length', 4, -1)
  """

  index: int
  token_ids: np.ndarray
  finish_reason: FinishReason
  logprobs: np.ndarray | None = None
  top_token_ids: np.ndarray | None = None
  top_logprobs: np.ndarray | None = None
  stop_token_id: int = -1

  @property
  def drawn_token_ids(self) -> np.ndarray:
    """i32: all tokens that the model drew, the stop token that ended the sample included."""
    return np.append(self.token_ids, np.int32(self.stop_token_id))[:len(self.token_ids) + (
        self.stop_token_id >= 0)]


# What to say of a request with a choice that ended as "error".
NOT_FINITE = ("the model gives logits that are NaN or infinite: check its weights, or load it in a "
              "wider dtype (model.dtype='bfloat16' or 'float32')")


@dataclasses.dataclass(frozen=True)
class Completion:
  """All samples of one request.

  Attributes:
    request_id: the request's.
    choices: its n samples in order of their index.
    num_prompt_tokens: length of the prompt.
    num_cached_tokens: prompt tokens whose KV another request had computed.
    prompt_logprobs: f32[prompt_len], the first one NaN (nothing precedes it), and those before
      `prompt_logprobs_start`; or None when not asked for.
    prompt_top_token_ids: i32[prompt_len, top_logprobs], or None.
    prompt_top_logprobs: f32[prompt_len, top_logprobs], or None.

  >>> params = batchjax.SamplingParams(temperature=0.0, n=2, max_tokens=4)
  >>> completion, = batchjax.generate(model, [batchjax.Request("a", [7, 8, 9], params)])
  >>> completion.request_id, [choice.index for choice in completion.choices]
  ('a', [0, 1])
  """

  request_id: str
  choices: tuple[Choice, ...]
  num_prompt_tokens: int
  num_cached_tokens: int
  prompt_logprobs: np.ndarray | None = None
  prompt_top_token_ids: np.ndarray | None = None
  prompt_top_logprobs: np.ndarray | None = None


class StopTable(NamedTuple):
  """Automata over token ids that recognise stop strings (`text.stop` builds them).

  State 0 is the start; state -1 says that a stop string is complete.

  Attributes:
    transitions: i16[U, V], the next state for each state and token; states count from their
      automaton's start.
    automaton: for each tuple of stop strings, the row of `transitions` where its automaton starts.
  """

  transitions: np.ndarray
  automaton: dict[tuple[str, ...], int]


class Segments(NamedTuple):
  """KV that a contiguous range of flat tokens attends to: one entry per (node, range).

  Token t attends to the KV of every segment that holds t, where the KV
  position is <= t's position. Unused entries have q_len = kv_len = 0.

  Attributes (all i32[S]):
    q_start, q_len: the token range.
    kv_start: absolute position of the segment's first KV token.
    kv_len: KV tokens that the segment holds.
    page_start: where its page list begins in `page_indices`.
  """

  q_start: np.ndarray
  q_len: np.ndarray
  kv_start: np.ndarray
  kv_len: np.ndarray
  page_start: np.ndarray


class SamplingInputs(NamedTuple):
  """Per-row sampling settings as arrays; widths B and E are the job's largest.

  Attributes:
    temperature, top_p, min_p: f32[R].
    top_k: i32[R], -1 keeps all.
    seed: u32[R]; sample_index: i32[R].
    min_tokens, max_tokens: i32[R].
    presence_penalty, frequency_penalty, repetition_penalty: f32[R].
    bias_ids: i32[R, B], -1 unused; bias_values: f32[R, B].
    stop_ids: i32[R, E], -1 unused; the model's end tokens included.
    automaton: i32[R], start of its automaton in the stop table, -1 without stop strings.
  """

  temperature: np.ndarray
  top_p: np.ndarray
  min_p: np.ndarray
  top_k: np.ndarray
  seed: np.ndarray
  sample_index: np.ndarray
  min_tokens: np.ndarray
  max_tokens: np.ndarray
  presence_penalty: np.ndarray
  frequency_penalty: np.ndarray
  repetition_penalty: np.ndarray
  bias_ids: np.ndarray
  bias_values: np.ndarray
  stop_ids: np.ndarray
  automaton: np.ndarray


class StepInputs(NamedTuple):
  """What one step computes, in the shapes of its bucket.

  Attributes:
    tokens: i32[T]; -1 takes the last token of slot `token_slots[t]` on the device.
    positions: i32[T], absolute; -1 is padding.
    token_slots: i32[T], the slot whose row this token belongs to; -1 for
      tokens of a shared node and for padding. Tokens of a finished slot write no KV.
    write_slots: i32[T], where the token's KV goes (page * page_size + offset); -1 drops it.
    segments: what each token attends to.
    page_indices: i32[I], the page lists of all segments, one behind the other.
    sample_tokens: i32[R], flat index of the token whose logits row r samples from; -1 unused.
    slots: i32[R], the device slot of row r; -1 unused.
    own_segments: i32[R], the segment with the row's own KV (decode loops grow it).
    is_first: bool[R], this is the first sample since the row entered its slot.
    stop_states: i32[R], automaton state on entry (used where `is_first`).
    num_generated: i32[R], tokens generated before this step.
    sampling: the rows' sampling settings.
    next_tokens: i32[T], the prompt token whose log-probability each token gives; -1 none;
      None where the job asks for no prompt log-probabilities.
  """

  tokens: np.ndarray
  positions: np.ndarray
  token_slots: np.ndarray
  write_slots: np.ndarray
  segments: Segments
  page_indices: np.ndarray
  sample_tokens: np.ndarray
  slots: np.ndarray
  own_segments: np.ndarray
  is_first: np.ndarray
  stop_states: np.ndarray
  num_generated: np.ndarray
  sampling: SamplingInputs
  next_tokens: np.ndarray | None = None


class StepOutputs(NamedTuple):
  """What one step drew; the leading axis counts the iterations of a decode loop (1 in a mixed step).

  Attributes:
    tokens: i32[steps, R]; -1 where the row drew nothing.
    finish: i8[steps, R]; 0 goes on, 1 stop token, 2 stop string, 3 length, 4 logits not finite.
    logprobs: f32[steps, R], of the model's distribution before temperature and masks; None if unused.
    top_token_ids: i32[steps, R, top]; None if unused.
    top_logprobs: f32[steps, R, top]; None if unused.
    prompt_logprobs: f32[T], of each token's successor in the prompt; None if unused.
    prompt_top_token_ids: i32[T, top]; None if unused.
    prompt_top_logprobs: f32[T, top]; None if unused.
  """

  tokens: np.ndarray
  finish: np.ndarray
  logprobs: np.ndarray | None = None
  top_token_ids: np.ndarray | None = None
  top_logprobs: np.ndarray | None = None
  prompt_logprobs: np.ndarray | None = None
  prompt_top_token_ids: np.ndarray | None = None
  prompt_top_logprobs: np.ndarray | None = None
