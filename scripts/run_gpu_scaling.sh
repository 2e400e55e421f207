#!/usr/bin/env bash
# Compares numbers of slots on one backlog:  scripts/run_gpu_scaling.sh [options]   (--help lists them)
# Results go to results/gpu_scaling. It starts Kafka, Redis and Flink unless they run or you name your own.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
"$root/scripts/setup.sh" --quiet
# Stay in the caller's folder, so that relative paths in options work; the virtual environment finds the modules.
exec "$root/.venv/bin/python" -P -m experiments.gpu_scaling "$@"
