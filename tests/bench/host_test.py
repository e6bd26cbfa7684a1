"""The host timed alone: what ran is right; how long it took is not asserted."""

import pytest

from batchjax.bench import host
from batchjax.bench.workloads import Draw, prefix_groups
from batchjax.config import ConfigError, EngineConfig
from batchjax.plan.cost import CHIPS
from batchjax.testing.fake_model import fake_config

ENGINE = EngineConfig(max_rows=8, max_step_tokens=64, page_size=8, num_pages=200,
                      max_decode_steps=4)


def workload(**sizes):
  return prefix_groups(Draw(50), **dict(num_requests=16, prefix_len=20, share_degree=4,
                                        distinct_len=4, output_len=10) | sizes)


def test_a_workload_runs_to_its_end():
  got = host.run(fake_config(), workload(), ENGINE, CHIPS["cpu"])
  assert got.plan_secs > 0 and got.dispatches.keys() == {"mixed", "decode"}
  for kind in got.dispatches.values():
    assert kind.count > 1 and 0 < kind.rows <= 8
    assert min(kind.next_batch_ms, kind.pack_ms, kind.retire_ms) > 0


def test_a_request_that_never_fits_is_named():
  with pytest.raises(ConfigError, match="request .* 2010 prompt tokens"):
    host.run(fake_config(), workload(prefix_len=2000, distinct_len=10), ENGINE, CHIPS["cpu"])
