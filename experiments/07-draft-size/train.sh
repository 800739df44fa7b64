#!/usr/bin/env bash
# Queries of three domains, the target's answers, and three draft models trained on them alike, into runs/size.
# Needs the data folder that SPECDEC_DATA_DIR names. About a quarter of an hour on two cores; every step resumes.
set -euo pipefail
cd "$(dirname "$0")/../.."
here=experiments/07-draft-size runs=runs/size
export OMP_NUM_THREADS=1
mkdir -p $runs

if [ ! -d $runs/queries ]; then
  rm -rf $runs/queries.part
  specdec collect gsm8k --domain gsm8k --num 1500 --out $runs/queries.part
  specdec collect sgd --domain sgd --num 1500 --append --out $runs/queries.part
  specdec collect taskmaster4 --domain taskmaster4 --num 1000 --append --out $runs/queries.part
  mv $runs/queries.part $runs/queries
fi
specdec regenerate $runs/queries --target demo --out $runs/answers \
  --temperature 0 --temperature 0.8 --max-new-tokens 128 --batch-size 64

train() {
  [ -f $runs/base-$1/tokenizer.json ] || python $here/base.py "$1" $runs/base-$1
  specdec train $here/train.yaml drafter.options.path=$runs/base-$1 --out $runs/draft-$1
}
train 8 > $runs/draft-8.log 2>&1 & # the largest takes as long as the other two
largest=$!
train 1
train 4
wait $largest
