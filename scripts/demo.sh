#!/usr/bin/env bash
# Make the environment if it is not there yet, then compare every draft strategy on the embedded
# models. Arguments are passed on, for instance: bash scripts/demo.sh prompts.num=9 repeats=1
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh plot
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
out="runs/demo-$(date +%Y%m%d-%H%M%S)"
exec .venv/bin/specdec bench demo --out "$out" "$@"
