#!/usr/bin/env bash
# Compares cache sizing policies on one load:  scripts/run_cache_experiments.sh [options]   (--help lists them)
# Results go to results/cache_experiments. It starts Kafka, Redis and Flink unless they run or you name your own.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
"$root/scripts/setup.sh" --quiet
# Stay in the caller's folder, so that relative paths in options work; the virtual environment finds the modules.
exec "$root/.venv/bin/python" -P -m experiments.cache_experiments "$@"
