#!/usr/bin/env bash
# Harms the production job in many ways and counts what came of it:  scripts/run_chaos.sh [options]   (--help lists them)
# Results go to results/chaos. It starts a stack of its own, on free ports and below .local/chaos.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
"$root/scripts/setup.sh" --quiet
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE="${HF_HUB_OFFLINE:-1}"
# A relative path among the options means the caller's folder; the modules are found by the virtual environment.
exec "$root/.venv/bin/python" -P -m tests.chaos "$@"
