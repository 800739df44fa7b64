#!/usr/bin/env bash
# The whole experiment, from the data folder that SPECDEC_DATA_DIR names to the results here.
# About an hour and a half on two cores; every step resumes.
set -euo pipefail
cd "$(dirname "$0")/../.."
here=experiments/03-domain runs=runs/domain
export OMP_NUM_THREADS=1

collect_and_answer() {
  [ -f "$runs/q-$1/collect.json" ] || specdec collect "$1" --domain "$1" --num "$2" --out "$runs/q-$1"
  specdec regenerate "$runs/q-$1" --target demo --out "$runs/a-$1" \
    --temperature 0 --temperature 0.8 --max-new-tokens 160 --batch-size 64
}
train() { specdec train "$here/$1.yaml" --out "$runs/$2" "${@:3}"; }

collect_and_answer taskmaster4 4400
collect_and_answer gsm8k 2230
collect_and_answer sgd 8900
python $here/nested.py $runs/a-gsm8k 2000
python $here/nested.py $runs/a-sgd 100 500 2000 8000

specdec features $runs/a-gsm8k-2000 --target demo --out $runs/f-gsm8k-2000 --taps eagle3 \
  --dry-run | tail -1 | python -m json.tool > $here/bytes.json
specdec features $runs/a-gsm8k-2000 --target demo --out $runs/f-gsm8k-2000 --taps eagle3

[ -f $runs/base/config.json ] || python $here/base.py $runs/base
train generic-draft generic-draft
train generic-eagle3 generic-eagle3
for domain in gsm8k sgd; do
  train qlora "qlora-$domain" data.path=$runs/a-$domain-2000
  train eagle3 "eagle3-$domain" data.path=$runs/a-$domain-2000
done
for size in 100 500 8000; do
  train qlora "qlora-sgd-$size" data.path=$runs/a-sgd-$size
done
# Larger sets are not read once in 250 steps of 16 rows.
for size in 2000 8000; do
  train qlora "qlora-sgd-$size-long" data.path=$runs/a-sgd-$size training.max_steps=800 training.eval_steps=200
done
for objective in cross_entropy reverse_kl total_variation; do
  train qlora "qlora-gsm8k-$objective" data.path=$runs/a-gsm8k-2000 loss.objective=$objective
done

# What a drafter that knows the domain already gains.
train qlora qlora-demo-gsm8k data.path=$runs/a-gsm8k-2000 drafter.options.path=demo training.learning_rate=1e-3

drafters=(demo=draft_model:demo)
for name in generic-draft qlora-gsm8k qlora-sgd qlora-sgd-100 qlora-sgd-500 qlora-sgd-8000 \
  qlora-gsm8k-cross_entropy qlora-gsm8k-reverse_kl qlora-gsm8k-total_variation \
  qlora-demo-gsm8k qlora-sgd-2000-long qlora-sgd-8000-long; do
  drafters+=("$name=draft_model:$runs/$name/drafter")
done
for name in generic-eagle3 eagle3-gsm8k eagle3-sgd; do
  drafters+=("$name=eagle3:$runs/$name/drafter")
done
for domain in gsm8k sgd taskmaster4; do
  python $here/alpha.py $runs/a-$domain "${drafters[@]}" --out "$here/alpha-$domain.json"
done
for domain in gsm8k sgd; do
  specdec bench "$here/bench.yaml" "prompts.source=$domain" --out "$runs/bench-$domain"
  mkdir -p "$here/bench-$domain"
  cp "$runs/bench-$domain/results.json" "$runs/bench-$domain/results.png" "$here/bench-$domain/"
done
python $here/throughput.py --out $here/throughput.json
python $here/gather.py $runs/*/results.json
python $here/plots.py
python $here/tables.py
python experiments/tables.py 03-domain ..
python experiments/plots.py 03-domain
