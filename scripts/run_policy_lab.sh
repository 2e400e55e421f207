#!/usr/bin/env bash
# Compares eviction and sizing policies on a trace, in virtual time:  scripts/run_policy_lab.sh [options]   (--help)
# Needs neither a model nor Kafka, Redis or Flink. Results go to results/policy_lab unless --out names a CSV.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
"$root/scripts/setup.sh" --quiet
# Stay in the caller's folder, so that relative paths in options work; the virtual environment finds the modules.
exec "$root/.venv/bin/python" -P -m experiments.policy_lab "$@"
