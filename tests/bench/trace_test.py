"""Traces: device time by kernel, idle time, and messages where there is nothing to read."""

import pathlib

import jax
import pytest

from batchjax.bench import trace


def write_trace(folder: pathlib.Path, plane: str, lines: dict[str, list[tuple[str, int, int]]]):
  """A trace with one plane; events are (name, begin, duration) in microseconds."""
  names = sorted({name for events in lines.values() for name, *_ in events})
  text = f'planes {{ name: "{plane}" '
  for line, events in lines.items():
    text += f'lines {{ name: "{line}" timestamp_ns: 5000 ' + "".join(
        f"events {{ metadata_id: {names.index(name) + 1} offset_ps: {begin * 10**6} "
        f"duration_ps: {length * 10**6} }} " for name, begin, length in events) + "} "
  for i, name in enumerate(names, start=1):
    text += f'event_metadata {{ key: {i} value {{ id: {i} name: "{name}" }} }} '
  data = jax.profiler.ProfileData.text_proto_to_serialized_xspace(text + "}")
  path = folder / "plugins/profile/then/host.xplane.pb"
  path.parent.mkdir(parents=True)
  path.write_bytes(data)


def test_profile_of_streams(tmp_path):
  write_trace(tmp_path, "/device:GPU:0", {
      "Stream #13(Compute)": [("gemm_1", 0, 40), ("gemm_2", 40, 20), ("softmax.7", 80, 10)],
      "Stream #14(Compute)": [("softmax_9_1", 85, 15)],
      "Stream #15(MemcpyH2D)": [("MemcpyH2D", 60, 20), ("MemcpyD2H", 100, 900)],
      "XLA Modules": [("jit_step", 0, 500)]})
  got = trace.read_profile(str(tmp_path))
  assert got.window_secs == pytest.approx(100e-6)
  assert got.idle_share == pytest.approx(0.2), "from 60 to 80; copies are no work"
  assert list(got.kernels) == ["gemm", "softmax"]
  assert got.kernels == pytest.approx({"gemm": 60e-6, "softmax": 25e-6})


def test_profile_counts_nested_events_for_the_innermost(tmp_path):
  write_trace(tmp_path, "/device:TPU:0", {
      "Steps": [("3", 0, 300)],
      "XLA Ops": [("while.1", 0, 100), ("fusion.3", 10, 30), ("copy.4", 15, 5),
                  ("fusion.5", 50, 40), ("dot.2", 110, 20)]})
  got = trace.read_profile(str(tmp_path))
  assert got.kernels == pytest.approx({"fusion": 65e-6, "while": 30e-6, "dot": 20e-6,
                                       "copy": 5e-6})
  assert got.idle_share == pytest.approx(10 / 130)


def test_profile_shows_the_largest_kernels(tmp_path):
  events = [(f"kernel{chr(97 + i)}", 100 * i, i + 1) for i in range(20)]
  write_trace(tmp_path, "/device:GPU:0", {"Stream #1(Compute)": events})
  kernels = trace.read_profile(str(tmp_path)).kernels
  assert list(kernels) == [name for name, *_ in events[:4:-1]]


def test_profile_without_device_events_says_what_is_there(tmp_path):
  with pytest.raises(trace.TraceError, match="no trace"):
    trace.read_profile(str(tmp_path))
  write_trace(tmp_path, "/device:GPU:0", {"Unknown": [("gemm", 0, 1)]})
  with pytest.raises(trace.TraceError, match="/device:GPU:0.*Unknown"):
    trace.read_profile(str(tmp_path))


def test_trace_that_never_begins_is_an_error(tmp_path):
  tracer = trace.Tracer(str(tmp_path), after_secs=5.0, secs=1.0)
  tracer.on_step(4.9)
  with pytest.raises(trace.TraceError, match="5.0 s"):
    tracer.close()
  trace.Tracer(None, after_secs=5.0, secs=1.0).close()
