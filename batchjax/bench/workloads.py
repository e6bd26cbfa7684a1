"""Workloads of uniform random tokens, by name: what `batchjax bench` runs. numpy only.

Every workload is a function of its flags, a vocabulary and a seed. All rows run
to their last token (`ignore_eos`), so the work of a job does not depend on weights.
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import functools
import inspect
import types

import numpy as np

from batchjax.plan.prefix_tree import build_prefix_tree
from batchjax.text.stop import build_stop_table
from batchjax.types import Request, SamplingParams, StopTable


@dataclasses.dataclass(frozen=True)
class Workload:
  """Requests in the order in which a file would hold them, and what they ask for."""

  requests: tuple[Request, ...]

  @property
  def prompt_tokens(self) -> int:
    """Every prompt once, however many samples are drawn of it."""
    return sum(len(r.prompt_token_ids) for r in self.requests)

  @property
  def prompt_tokens_asked(self) -> int:
    """Every prompt once per sample: what an engine without any sharing computes."""
    return sum(len(r.prompt_token_ids) * r.sampling_params.n for r in self.requests)

  @functools.cached_property
  def prompt_tokens_optimal(self) -> int:
    """Prompt tokens when every shared prefix is computed once, chance ones included."""
    return int(build_prefix_tree([r.prompt_token_ids for r in self.requests]).length.sum())

  @property
  def output_tokens(self) -> int:
    """Tokens to generate."""
    return sum(r.sampling_params.max_tokens * r.sampling_params.n for r in self.requests)

  def stop_table(self, vocab_size: int) -> StopTable | None:
    """Automata of the requests' stop strings, where token i reads as the number i; None without any."""
    stops = {r.sampling_params.stop for r in self.requests} - {()}
    return build_stop_table(stops, [b"%d " % i for i in range(vocab_size)]) if stops else None


def never_drawn(num_strings: int) -> tuple[str, ...]:
  """Stop strings that no numbers hold, though every one begins like numbers do."""
  return tuple(f"{i} .." for i in range(num_strings))


class Draw:
  """Draws tokens uniform below `vocab_size` from a seed, and makes requests of prompts.

  Args:
    vocab_size, seed: of the tokens.
    sampling: of all requests, save for their lengths, samples and seeds.
  """

  def __init__(self, vocab_size: int, seed: int = 0,
               sampling: SamplingParams = SamplingParams(temperature=0.0)):
    self.rng = np.random.default_rng(seed)
    self._vocab_size, self._sampling = vocab_size, sampling

  def tokens(self, length: int) -> np.ndarray:
    """i32[length]."""
    return self.rng.integers(0, self._vocab_size, length, dtype=np.int32)

  def workload(self, prompts: Sequence[np.ndarray], output_lens: Sequence[int], *, n: int = 1,
               shuffled: bool = False) -> Workload:
    """One request for each prompt; `shuffled` puts them in random order."""
    requests = tuple(
        Request(f"request-{i}", prompt, dataclasses.replace(
            self._sampling, n=n, seed=i, max_tokens=int(output_len), ignore_eos=True))
        for i, (prompt, output_len) in enumerate(zip(prompts, output_lens, strict=True)))
    if shuffled:
      requests = tuple(requests[i] for i in self.rng.permutation(len(requests)))
    return Workload(requests)


def prefix_groups(draw: Draw, *, num_requests: int = 1024, prefix_len: int = 2000,
                  share_degree: int = 16, distinct_len: int = 200, output_len: int = 100,
                  shuffled: bool = True) -> Workload:
  """Groups of `share_degree` requests with a prefix of their own each."""
  num_groups = -(-num_requests // share_degree)
  prefixes = [draw.tokens(prefix_len) for _ in range(num_groups)]
  prompts = [np.append(prefixes[i // share_degree], draw.tokens(distinct_len))
             for i in range(num_requests)]
  return draw.workload(prompts, [output_len] * num_requests, shuffled=shuffled)


def samples(draw: Draw, *, num_prompts: int = 128, prompt_len: int = 900, num_samples: int = 64,
            output_len: int = 256) -> Workload:
  """`num_samples` samples of every prompt; prompts share nothing."""
  prompts = [draw.tokens(prompt_len) for _ in range(num_prompts)]
  return draw.workload(prompts, [output_len] * num_prompts, n=num_samples)


def random(draw: Draw, *, num_requests: int = 512, prompt_len: int = 1024,
           output_len: int = 256) -> Workload:
  """Requests of one length that share nothing."""
  prompts = [draw.tokens(prompt_len) for _ in range(num_requests)]
  return draw.workload(prompts, [output_len] * num_requests)


def mixed_lengths(draw: Draw, *, num_requests: int = 1024, prompt_len: int = 512,
                  output_len: int = 128, sigma: float = 1.0) -> Workload:
  """Log-normal lengths: medians `prompt_len` and `output_len`, spread `sigma` of the logarithm.

  Lengths lie between one token and eight times the median.
  """
  def lens(median):
    drawn = median * np.exp(sigma * draw.rng.standard_normal(num_requests))
    return np.clip(drawn.round(), 1, 8 * median).astype(int)

  prompt_lens, output_lens = lens(prompt_len), lens(output_len)
  return draw.workload([draw.tokens(n) for n in prompt_lens], output_lens)


def multi_level(draw: Draw, *, num_documents: int = 64, questions_per_document: int = 16,
                system_len: int = 500, document_len: int = 2000, question_len: int = 50,
                output_len: int = 100, shuffled: bool = True) -> Workload:
  """One system prompt, then a document, then a question about it."""
  system = draw.tokens(system_len)
  prompts = []
  for _ in range(num_documents):
    document = np.append(system, draw.tokens(document_len))
    prompts += [np.append(document, draw.tokens(question_len))
                for _ in range(questions_per_document)]
  return draw.workload(prompts, [output_len] * len(prompts), shuffled=shuffled)


WORKLOADS: Mapping[str, Callable[..., Workload]] = types.MappingProxyType({
    f.__name__: f for f in (prefix_groups, samples, random, mixed_lengths, multi_level)})


def default_sizes(name: str) -> dict[str, int | float | bool]:
  """The flags of a workload, each with its default."""
  parameters = inspect.signature(WORKLOADS[name]).parameters.values()
  return {p.name: p.default for p in parameters if p.name != "draw"}
