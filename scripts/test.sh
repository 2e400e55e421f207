#!/usr/bin/env bash
# All checks before a merge: lint, formatting, types, then all tests. The tests start the Kafka, Redis and Flink that
# they need, on free ports.
#
#   scripts/test.sh                       all of it: what CI runs
#   scripts/test.sh tests/core -k record  only pytest, with these arguments
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
cd "$root"

scripts/setup.sh
export PATH="$root/.venv/bin:$PATH"
# Tests build all their models themselves.
export HF_HUB_OFFLINE=1

if (($# > 0)); then
    exec pytest "$@"
fi
echo "test: ruff check" && ruff check .
echo "test: ruff format --check" && ruff format --check .
echo "test: mypy" && mypy
# Tests on the real cluster leave cores idle, so the other tests run beside them. Their output is printed afterwards.
echo "test: pytest"
others=$(mktemp)
pytest -m "not integration" >"$others" 2>&1 &
running=$!
status=0
pytest -m integration || status=$?
wait "$running" || status=$?
cat "$others"
rm "$others"
exit "$status"
