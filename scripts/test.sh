#!/usr/bin/env bash
# Make the environment if it is not there yet, then lint, type-check and test. Safe to run again.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh dev
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/mypy
exec .venv/bin/python -m pytest -q -n 2 --dist loadfile --timeout 300 --durations 40 -m "not gpu" "$@"
