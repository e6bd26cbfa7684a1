"""The HTML page: whole, escaped, self-contained, at every stage of a job."""

import html.parser
import pathlib
import subprocess
import sys

import pytest

from batchjax.report.page import render_page, write_page

_VOID = {"meta", "br", "hr", "img", "link"}
_REPORT = pathlib.Path(__file__).parents[2] / "scripts" / "report.py"


class _Page(html.parser.HTMLParser):
  """Checks that tags nest, and collects text, tags and rows of tables."""

  def __init__(self, text: str):
    super().__init__()
    self.open_tags: list[str] = []
    self.tags: list[str] = []
    self.links: list[str] = []
    self.texts: list[str] = []
    self.rows: list[list[str]] = []
    self.feed(text)
    self.close()
    assert not self.open_tags

  def handle_starttag(self, tag, attrs):
    self.tags.append(tag)
    self.links += [value for name, value in attrs if name in ("src", "href", "xlink:href")]
    if tag == "tr":
      self.rows.append([])
    if tag in ("td", "th"):
      self.rows[-1].append("")
    if tag not in _VOID:
      self.open_tags.append(tag)

  def handle_startendtag(self, tag, attrs):
    self.links += [value for name, value in attrs if name in ("src", "href", "xlink:href")]

  def handle_endtag(self, tag):
    assert self.open_tags.pop() == tag

  def handle_data(self, data):
    if self.open_tags and self.open_tags[-1] in ("td", "th"):
      self.rows[-1][-1] += data
    if data.strip() and "style" not in self.open_tags:
      self.texts.append(data.strip())


def test_the_page_states_the_facts(job_dir):
  page = _Page(render_page(job_dir))
  assert page.tags.count("svg") == 2 * 4  # for wide and for narrow screens
  assert {"13", "3", "10.0 s", "40.0%", "25.0%", "18.8%", "75.0%", "0.1 s"} <= set(page.texts)
  text = " ".join(" ".join(page.texts).split())
  assert "Last run: 2 requests, 2 tokens drawn, 6.0 s from call to end: 1.0 s in steps" in text
  assert "All runs: 3 requests, 52 tokens drawn, 10.0 s from call to end: 4.0 s in steps" in text
  assert ["mixed", "2", "2", "2.0", "240", "256", "6.2%"] in page.rows
  assert ["decode", "1", "16", "2.0", "48", "128", "62.5%"] in page.rows
  assert ["last", "2", "6.00", "0.00", "100", "70", "10", "stop"] in page.rows
  assert ["decode 8", "0.50", "yes"] in page.rows
  assert ["computed, as planned", "230", "57.5%"] in page.rows
  assert ["computed, by the last run", "50", "12.5%"] in page.rows
  assert ["computed, at the optimum", "220", "55.0%"] in page.rows
  assert ["Predicted time in steps, at least", "9.5 s"] in page.rows
  assert ["Shape of mixed steps", "128 tokens, 8 rows"] in page.rows
  assert ["1.1", "20", "2", "20", "<b>Q</b>: Why?"] in page.rows
  assert ["2023-11-14 22:14:20 UTC", "4 × TPU v5e", "0.10.2", "2", "2", "6.0", "40 × 16",
          "8"] in page.rows


def test_settings_are_the_manifests_flattened(job_dir):
  rows = _Page(render_page(job_dir)).rows
  assert ["input", "a & b.jsonl"] in rows
  assert ["engine.max_rows", "8"] in rows
  assert ["engine.share_prefixes", "true"] in rows
  assert ["engine.stop", "[]"] in rows


def test_user_text_is_escaped(job_dir):
  text = render_page(job_dir)
  page = _Page(text)
  assert "script" not in page.tags and "llama" not in page.tags
  assert "&lt;script&gt;alert(1)&lt;/script&gt;" in text
  assert any(row[0] == "<script>alert(1)</script>" for row in page.rows)
  (job_dir / "manifest.json").write_text('{"<b>": "<img src=x>"}')
  page = _Page(render_page(job_dir))
  assert ["<b>", "<img src=x>"] in page.rows and "img" not in page.tags


def test_nothing_is_loaded_from_elsewhere(job_dir):
  text = render_page(job_dir)
  assert all(link.startswith("#") for link in _Page(text).links)
  assert "@import" not in text and "url(http" not in text


def test_an_empty_job_says_what_is_missing(tmp_path):
  page = _Page(render_page(tmp_path))
  assert "svg" not in page.tags
  for reason in ("No run is recorded yet.", "No step is recorded.", "No request is answered yet.",
                 "No compile is recorded yet.", "manifest.json is not in the job directory.",
                 "plan.json is not in the job directory: no plan is written yet."):
    assert reason in page.texts


def test_the_page_is_whole_wherever_the_metrics_are_cut(job_dir):
  path = job_dir / "metrics.jsonl"
  lines = path.read_text().splitlines(keepends=True)
  num_pictures = []
  for i in (1, 4, 5, 8):
    path.write_text("".join(lines[:i]) + lines[i][:15])
    num_pictures.append(_Page(render_page(job_dir)).tags.count("svg"))
  assert num_pictures == [2, 2, 6, 8]


@pytest.mark.parametrize("name", ["plan.json", "manifest.json"])
def test_a_damaged_file_is_named_in_its_place(job_dir, name):
  (job_dir / name).write_text('{"nodes"')
  page = _Page(render_page(job_dir))
  assert any(text.startswith(f"{name} is not") for text in page.texts)
  assert page.tags.count("svg") == (6 if name == "plan.json" else 8)


def test_a_plan_without_sharing_says_so(job_dir):
  (job_dir / "plan.json").write_text(
      '{"nodes": [], "totals": {"prompt_tokens_asked": 9, "prompt_tokens_computed": 9, '
      '"optimum": 9}}')
  assert "No prompt prefix is shared." in _Page(render_page(job_dir)).texts


def test_the_page_is_replaced_whole(job_dir, tmp_path):
  path = tmp_path / "report.html"
  path.write_text("old")
  write_page(job_dir, path)
  assert path.read_text(encoding="utf-8") == render_page(job_dir)
  with pytest.raises(FileNotFoundError):
    write_page(tmp_path / "none", path)
  assert sorted(p.name for p in tmp_path.iterdir()) == ["out.jsonl.job", "report.html"]


def test_an_id_that_cannot_be_encoded_is_written_with_a_mark(job_dir, tmp_path):
  (job_dir / "manifest.json").write_text(r'{"name": "a\ud800b"}')
  write_page(job_dir, tmp_path / "report.html")
  rows = _Page((tmp_path / "report.html").read_text(encoding="utf-8")).rows
  assert ["name", "a?b"] in rows


def test_the_script_prints_the_text_and_writes_the_page(job_dir, tmp_path):
  command = [sys.executable, str(_REPORT)]
  environment = {"PYTHONPATH": str(_REPORT.parents[1])}
  done = subprocess.run([*command, f"--job={job_dir}", f"--html={tmp_path / 'r.html'}"],
                        env=environment, capture_output=True, text=True, check=True)
  assert done.stdout.startswith("job       out.jsonl.job: complete, 3 of 4 requests")
  assert (tmp_path / "r.html").read_text(encoding="utf-8").startswith("<!doctype html>")
  failed = subprocess.run([*command, f"--job={tmp_path / 'none'}"], env=environment,
                          capture_output=True, text=True, check=False)
  assert failed.returncode != 0 and "is no job directory" in failed.stdout + failed.stderr
  assert "Traceback" not in failed.stderr
