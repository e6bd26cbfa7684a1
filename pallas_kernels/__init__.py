"""Kernels of batchjax. Imports jax and numpy only."""
