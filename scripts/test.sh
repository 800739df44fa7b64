#!/usr/bin/env bash
# Make the environments if they are not there yet, then lint, type-check and test. Safe to run again.
# Tests in vLLM run where `bash scripts/engines.sh vllm` was run before; they are skipped elsewhere.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh dev
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/mypy & types=$! # beside what uses the other core, or none
bash scripts/engines.sh llamacpp
# Where nothing may be cached, every process that a test starts would compile the package anew.
unset PYTHONDONTWRITEBYTECODE
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
.venv/bin/python -m pytest -q -n 2 --dist loadfile --timeout 300 --durations 40 -m "not gpu" "$@"
wait "$types"
