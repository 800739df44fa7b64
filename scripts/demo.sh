#!/usr/bin/env bash
# Make the environment if it is not there yet, then compare every draft strategy on the embedded
# models. Arguments are passed on, for instance: bash scripts/demo.sh prompts.num=9 repeats=1
# A run that was stopped goes on with the same command.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh plot
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
run="demo-$(echo "$*" | sha256sum | cut -c1-8)"  # one name for the same arguments
out="$(ls -d runs/"$run"-* 2> /dev/null | tail -1 || true)"
if [ -z "$out" ] || [ -e "$out/results.json" ]; then
  out="runs/$run-$(date +%Y%m%d-%H%M%S)"
else
  echo "Going on with $out"
fi
exec .venv/bin/specdec bench demo --out "$out" "$@"
