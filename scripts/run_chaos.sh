#!/usr/bin/env bash
# Injects faults into the production job and accounts for every request:  scripts/run_chaos.sh [options]   (--help)
# Results go to results/chaos. It starts its own stack, on free ports and below .local/chaos.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
"$root/scripts/setup.sh" --quiet
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE="${HF_HUB_OFFLINE:-1}"
# Stay in the caller's folder, so that relative paths in options work; the virtual environment finds the modules.
exec "$root/.venv/bin/python" -P -m tests.chaos "$@"
