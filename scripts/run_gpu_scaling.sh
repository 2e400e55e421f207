#!/usr/bin/env bash
# Compares numbers of slots on one backlog:  scripts/run_gpu_scaling.sh [options]   (--help lists them)
# Results go to results/gpu_scaling; Kafka, Redis and Flink are started for it unless they run or are named.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
"$root/scripts/setup.sh" --quiet
# A relative path among the options means the caller's folder; the modules are found by the virtual environment.
exec "$root/.venv/bin/python" -P -m experiments.gpu_scaling "$@"
