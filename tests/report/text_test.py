"""The plain-text report."""

import dataclasses

from batchjax.report import summarize, to_text


def test_the_text_states_the_facts(job_dir):
  assert to_text(summarize(job_dir)).splitlines() == [
      "job       out.jsonl.job: complete, 3 of 4 requests answered, 1 errors, 2 runs,",
      "          added up below",
      "model     tiny <llama> on 4 x TPU v5e, jax 0.10.2",
      "time      last run, 2 requests: 6.0 s from call to end: 1.0 s in steps, 0.2 s",
      "          loading the model, 0.1 s reading rows, 4.6 s other",
      "          all runs, 3 requests: 10.0 s from call to end: 4.0 s in steps, 0.1 s",
      "          compiling, 0.8 s loading the model, 0.4 s reading rows, 0.1 s",
      "          planning, 4.7 s other",
      "speed     last run, 2 requests: 2.0 output tok/s in steps, 0.3 from call to end",
      "          all runs, 3 requests: 13.0 output tok/s in steps, 5.2 from call to end",
      "prompt    400 tokens asked, 168 computed; 40.0% cached",
      "output    52 tokens drawn, 60 in answers",
      "finish    2 stop, 1 error, 1 length",
      "steps     2 mixed in 2.0 s, 1 decode (16 iterations) in 2.0 s",
      "padding   25.0% of launched tokens",
      "host      18.8% of step time",
      "kv        peak 75.0%, 30 of 40 pages of 16 tokens; 3 rows preempted",
      "compiles  2 shapes, 1 of them from the cache",
      "slowest   last 6.0 s (100 prompt, 10 output tokens)",
      "          lost 5.0 s (100 prompt, 30 output tokens)",
      "          <script>alert(1)</script> 3.0 s (100 prompt, 20 output tokens)",
  ]


def test_a_job_without_runs_is_one_line(tmp_path):
  assert to_text(summarize(tmp_path)).endswith(": no run recorded yet")


def test_nothing_answered_yet_says_so(job_dir):
  path = job_dir / "metrics.jsonl"
  path.write_text("".join(path.read_text().splitlines(keepends=True)[:5]))
  text = to_text(summarize(job_dir))
  assert "cached share not known yet" in text and "none yet" in text
  assert "not complete, 0 of 4" in text and "slowest" not in text


def test_ids_cannot_steer_the_terminal(job_dir):
  summary = summarize(job_dir)
  evil = dataclasses.replace(summary.slowest[0], request_id="a\x1b[2J\nb")
  text = to_text(dataclasses.replace(summary, slowest=(evil,)))
  assert "\x1b" not in text and r"slowest   a\x1b[2J\nb 6.0 s" in text
