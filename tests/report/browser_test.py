"""The page in a real browser: nothing overflows, nothing is asked of the network, nothing fails."""

import base64
import html
import json
import re
import shutil
import subprocess

import pytest

from batchjax.report.page import render_page

_WIDTHS = (400, 1280)
_BROWSER = shutil.which("chromium") or shutil.which("chromium-browser")
# Each page lies in a frame of each width; what the frames are like is the text of the document.
_DOCUMENT = """<!doctype html><meta charset="utf-8"><body><script>
addEventListener("load", () => {
  const seen = [...document.querySelectorAll("iframe")].map(frame => ({
    width: frame.contentWindow.innerWidth,
    scroll_width: frame.contentDocument.documentElement.scrollWidth,
    text: frame.contentDocument.body.innerText,
    requests: frame.contentWindow.performance.getEntriesByType("resource").map(e => e.name)}));
  document.body.textContent = "[[" + btoa(unescape(encodeURIComponent(JSON.stringify(seen)))) + "]]";
});
</script>"""
_FRAME = '<iframe style="width:{width}px;height:800px;border:0" srcdoc="{page}"></iframe>'

pytestmark = pytest.mark.skipif(_BROWSER is None, reason="chromium is not installed")


def _look(tmp_path, *pages: str) -> tuple[list[dict], str]:
  """What each page is like at each width, and what the browser complained of."""
  path = tmp_path / "frames.html"
  path.write_text(_DOCUMENT + "".join(_FRAME.format(width=width, page=html.escape(page))
                                      for page in pages for width in _WIDTHS), encoding="utf-8")
  done = subprocess.run(
      [_BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run",
       f"--user-data-dir={tmp_path / 'profile'}", "--enable-logging=stderr", "--window-size=1400,900",
       "--virtual-time-budget=5000", "--dump-dom", path.as_uri()],
      capture_output=True, text=True, check=True, timeout=120)
  seen = json.loads(base64.b64decode(re.search(r"\[\[(.*)\]\]", done.stdout)[1]))
  complaints = [line for line in done.stderr.splitlines() if ":CONSOLE" in line]
  return seen, "\n".join(complaints)


def test_pages_of_every_state_fit_and_are_whole(job_dir, tmp_path):
  lines = (job_dir / "metrics.jsonl").read_text().splitlines(keepends=True)
  pages = [render_page(job_dir)]  # resumed, done, with an error row and a long name
  (job_dir / "metrics.jsonl").write_text("".join(lines[:5]))
  pages.append(render_page(job_dir))  # running
  empty = tmp_path / "none.jsonl.job"
  empty.mkdir()
  pages.append(render_page(empty))
  seen, complaints = _look(tmp_path, *pages)
  assert not complaints
  assert [frame["width"] for frame in seen] == list(_WIDTHS) * len(pages)
  for frame in seen:
    assert frame["scroll_width"] <= frame["width"]
    assert not frame["requests"]
  assert "3\nof 4 requests answered" in seen[0]["text"] and "Not complete" in seen[2]["text"]
  assert "No run is recorded yet." in seen[4]["text"]


def test_what_the_test_looks_for_would_be_seen(tmp_path):
  seen, complaints = _look(
      tmp_path, "<body><div style='width:2000px'>x</div>",
      render_page(tmp_path).replace("<h1>", "<img src='http://127.0.0.1:9/x.png'><h1>"))
  assert seen[0]["scroll_width"] > 400 and seen[1]["scroll_width"] > 1280
  assert "Content Security Policy" in complaints, "the page itself forbids requests"
