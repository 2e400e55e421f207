#!/usr/bin/env bash
# Compares batch sizes, and continuous batching, on one load:  scripts/run_batch_analysis.sh [options]   (--help)
# Results go to results/batch_analysis; Kafka, Redis and Flink are started for it unless they run or are named.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
"$root/scripts/setup.sh" --quiet
# A relative path among the options means the caller's folder; the modules are found by the virtual environment.
exec "$root/.venv/bin/python" -P -m experiments.batch_analysis "$@"
