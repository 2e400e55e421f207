#!/usr/bin/env bash
# Compares batch sizes and continuous batching on one load:  scripts/run_batch_analysis.sh [options]   (--help)
# Results go to results/batch_analysis. It starts Kafka, Redis and Flink unless they run or you name your own.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
"$root/scripts/setup.sh" --quiet
# Stay in the caller's folder, so that relative paths in options work; the virtual environment finds the modules.
exec "$root/.venv/bin/python" -P -m experiments.batch_analysis "$@"
