#!/usr/bin/env bash
# The local Kafka, Redis and Flink:  scripts/cluster.sh start | stop | status [options]   (--help lists them)
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
"$root/scripts/setup.sh" --quiet
exec "$root/.venv/bin/python" -m local_stack "$@"
