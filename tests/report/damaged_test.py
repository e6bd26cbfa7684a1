"""A report on a damaged job folder says what is damaged, or reports."""

import json
import os
import random

import pytest

from batchjax.io.files import NotRegular
from batchjax.report import MetricsError, MetricsWriter, read_records, summarize, to_text
from batchjax.report.page import render_page, write_page
from batchjax.report.sharing import PlanFileError, read_plan_file


def values_like(rng, value):
  return rng.choice(("x", "1", -1, 1e300, 10**400, 2**63, True, None, [], {}, [value], 0.5, "\x1b[2J"))


@pytest.mark.parametrize("seed", range(4))
def test_metrics_of_any_values(job_dir, seed):
  """A record has values of its types in their ranges, or its line is named."""
  path = job_dir / "metrics.jsonl"
  lines, rng, num_errors = path.read_text().splitlines(), random.Random(seed), 0
  for _ in range(100):
    at = rng.randrange(len(lines))
    record = json.loads(lines[at])
    name = rng.choice(list(record))
    record[name] = values_like(rng, record[name])
    path.write_text("".join(line + "\n" for line in lines[:at] + [json.dumps(record)] + lines[at + 1:]))
    try:
      text = to_text(summarize(job_dir))
      assert "\x1b" not in text
    except MetricsError as error:
      num_errors += 1
      assert f"line {at + 1} is not a record" in str(error) or "a run must come first" in str(error)
  assert 10 < num_errors < 100


@pytest.mark.parametrize("seed", range(4))
def test_flipped_metrics_and_plan(job_dir, plan_values, seed):
  rng = random.Random(seed)
  for name, read_fn, error in (("metrics.jsonl", lambda path: to_text(summarize(job_dir)), MetricsError),
                               ("plan.json", read_plan_file, PlanFileError)):
    whole = (job_dir / name).read_bytes()
    for _ in range(100):
      data = bytearray(whole)
      for _ in range(rng.choice((1, 2, 9))):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
      (job_dir / name).write_bytes(data)
      try:
        read_fn(job_dir / name)
      except error:
        pass
    (job_dir / name).write_bytes(whole)


def test_a_page_of_the_largest_values_is_drawn(job_dir):
  path = job_dir / "metrics.jsonl"
  records = [json.loads(line) for line in path.read_text().splitlines()]
  for record in records:
    for name, value in record.items():
      if isinstance(value, (int, float)) and not isinstance(value, bool):
        record[name] = type(value)(1e11)
  path.write_text("".join(json.dumps(record) + "\n" for record in records))
  assert "5138-11-16" in render_page(job_dir)


@pytest.mark.parametrize("text", ["[" * 10**5, "[1]", "\x1b", '{"nodes": [], "totals": {"optimum": "x"}}'])
def test_a_damaged_plan_or_manifest_is_named_in_its_place(job_dir, text):
  (job_dir / "metrics.jsonl").unlink()
  for name in ("plan.json", "manifest.json"):
    (job_dir / name).write_text(text)
  assert "plan.json is not a plan file" in render_page(job_dir)


def test_links_and_pipes_are_not_opened(job_dir, tmp_path, run_record):
  secret = tmp_path / "secret"
  secret.write_text('{"secret": "of others"}\n')
  for make_fn in (lambda path: path.symlink_to(secret), os.mkfifo):
    for name in ("plan.json", "manifest.json", "metrics.jsonl"):
      (job_dir / name).unlink(missing_ok=True)
      make_fn(job_dir / name)
    with pytest.raises(NotRegular, match="metrics.jsonl is a"):
      list(read_records(job_dir / "metrics.jsonl"))
    with pytest.raises(NotRegular, match="metrics.jsonl is a"):
      MetricsWriter(job_dir / "metrics.jsonl")
    (job_dir / "metrics.jsonl").unlink()
    page = render_page(job_dir)
    assert "of others" not in page and "plan.json is a " in page and "manifest.json is a " in page
  assert secret.read_text() == '{"secret": "of others"}\n'


def test_the_page_does_not_follow_a_link(job_dir, tmp_path):
  (tmp_path / "mine").write_text("mine")
  for name in ("report.html", "report.html.tmp"):
    (job_dir / name).symlink_to(tmp_path / "mine")
  write_page(job_dir, job_dir / "report.html")
  assert (tmp_path / "mine").read_text() == "mine"
  assert not (job_dir / "report.html").is_symlink()
