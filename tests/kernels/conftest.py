"""What the kernels' tests share."""

import jax
import pytest


@pytest.fixture
def quick_compiler():
  """XLA spends no time on fast code, where compiling takes seconds and running milliseconds."""
  jax.config.update("jax_disable_most_optimizations", True)
  yield
  jax.config.update("jax_disable_most_optimizations", False)
