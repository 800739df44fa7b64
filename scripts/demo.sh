#!/usr/bin/env bash
# Make the environment if it is not there yet, then measure every draft strategy on the embedded
# models: a table, a picture and their records. Safe to run again; what is done is not done twice.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh plot
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
exec .venv/bin/specdec bench demo --out runs/demo-bench "$@"
