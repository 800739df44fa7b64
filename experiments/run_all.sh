#!/usr/bin/env bash
# Run the experiments again, from the data folder that SPECDEC_DATA_DIR names, and put their results here.
#
#   SPECDEC_DATA_DIR=DATA bash experiments/run_all.sh            # all but 03-domain: about 135 minutes on two cores
#   SPECDEC_DATA_DIR=DATA bash experiments/run_all.sh 09-rules   # or some, by name
#
# Whatever is stopped goes on with the same command: runs are kept in runs/experiments (remove a folder to measure it again).
# `specdec` must be on the PATH: pip install -e '.[train]'. Nothing else should run on the machine meanwhile.
set -euo pipefail
cd "$(dirname "$0")/.."
here=experiments runs=runs/experiments
all=(01-core 02-heads 04-recipes 05-drafters 06-shapes 07-draft-size 08-sampling 09-rules 10-batch 11-prediction 12-serving 13-scaling 14-compiled 15-engines 16-drafters)
suites="single-turn multi-turn long-context concurrent"
names=("$@")
[ $# -gt 0 ] || names=("${all[@]}")
for name in "${names[@]}"; do
  [[ " ${all[*]} " == *" $name "* ]] || { echo "run_all.sh: no experiment $name; there are ${all[*]}" >&2; exit 2; }
done
: "${SPECDEC_DATA_DIR:?must name the folder with the data sets; see README.md}"
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
mkdir -p $runs

bench() { # bench NAME CONFIG [key=value...]
  specdec bench "$2" "${@:3}" --out "$runs/$1" | sed '$d' # without the line for machines
}

admit() { # admit ENGINE DRAFTER
  specdec admit "$2" --engine "$1" --prompts gsm8k,sgd --num 10 --out "$runs/15-admitted/$1-${2##*[/-]}"
}

measure() {
  case $1 in
    01-core)
      bench 01-batch1 $here/01-core/bench.yaml
      bench 01-batch8 $here/01-core/bench-batch8.yaml
      ;;
    02-heads)
      for kind in t0 t1; do bench 02-$kind $here/02-heads/bench-$kind.yaml; done
      bench 02-tune $here/02-heads/tune.yaml
      ;;
    04-recipes)
      [ -d $runs/04-queries ] || specdec collect banking77 --num 2000 --out $runs/04-queries
      specdec regenerate $runs/04-queries --target demo --max-new-tokens 128 --out $runs/04-answers
      specdec train recipes/demo/qlora_draft_model.yaml data.path=$runs/04-answers --out $runs/04-qlora
      bench 04-qlora-bench demo prompts.source=$runs/04-queries \
        "arms=[{name: before, type: draft_model, options: {path: demo}}, {name: after, type: draft_model, options: {path: $runs/04-qlora/drafter}}]"
      ;;
    05-drafters | 06-shapes) bench "$1" "$here/$1/bench.yaml" ;;
    07-draft-size)
      bash $here/07-draft-size/train.sh
      bench 07-draft-size $here/07-draft-size/bench.yaml
      ;;
    08-sampling)
      bench 08-temperature $here/08-sampling/temperature.yaml
      bench 08-top-p $here/08-sampling/top-p.yaml
      ;;
    09-rules)
      bench 09-chains $here/09-rules/chains.yaml
      bench 09-trees $here/09-rules/trees.yaml
      ;;
    10-batch)
      bench 10-fixed $here/10-batch/fixed.yaml
      [ -f $runs/10-plan/plan.json ] || specdec plan $here/10-batch/plan.yaml --out $runs/10-plan
      python $here/10-batch/planned.py $runs/10-plan/plan.json > $runs/10-planned.txt
      mapfile -t planned < $runs/10-planned.txt
      bench 10-held-out $here/10-batch/follow.yaml "${planned[@]}"
      bench 10-hostile $here/10-batch/follow.yaml "${planned[@]}" \
        prompts.source=$here/10-batch/hostile.txt prompts.num=24 sampling.temperature=1 \
        repeats=4 'grid.batch_size=[1,4,16]'
      bench 10-users $here/10-batch/users.yaml "${planned[@]:0:2}"
      ;;
    11-prediction)
      [ -f $runs/11-plan/plan.json ] ||
        specdec plan $here/11-prediction/configurations.yaml --out $runs/11-plan
      python $here/11-prediction/measured.py $runs/11-plan/plan.json $runs/11-measured.yaml
      bench 11-same $runs/11-measured.yaml
      bench 11-fresh $runs/11-measured.yaml prompts.seed=1 repeats=1
      # Goals that are missed are a result.
      python $here/11-prediction/check.py $runs/11-plan $runs/11-same/results.json || true
      ;;
    12-serving)
      for suite in $suites; do bench 12-$suite demo/$suite; done
      ;;
    13-scaling)
      [ -f $runs/13-scaling/scaling.json ] ||
        python $here/13-scaling/scaling.py --out $runs/13-scaling/scaling.json
      ;;
    14-compiled) # other packages in .engines/peers
      bash $here/14-compiled/peers.sh
      [ -f $runs/14-compiled/results.json ] ||
        python $here/14-compiled/measure.py --out $runs/14-compiled
      ;;
    15-engines) # engines in .engines, see scripts/engines.sh; status 1 if an engine fails
      specdec bake-off $here/15-engines/bake-off.yaml --out $runs/15-engines | sed '$d'
      [ -d $runs/15-speculators ] ||
        specdec export demo/eagle3 --to speculators --target demo --out $runs/15-speculators
      for drafter in demo/eagle3 $runs/15-speculators demo/eagle draft_model demo/medusa suffix ngram; do
        admit vllm $drafter
      done
      for drafter in demo/eagle3 draft_model; do admit llama.cpp $drafter; done
      ;;
    16-drafters)
      [ -f runs/heads/answers.jsonl ] ||
        python scripts/train_demo.py answers --data-dir "$SPECDEC_DATA_DIR" --out runs/heads --num 2048
      specdec features runs/heads/answers.jsonl --target demo --out $runs/16-features \
        --taps eagle3,eagle --dtype float32 --top-k 0
      [ -f $runs/16-heads/heads.json ] ||
        python $here/16-drafters/heads.py $runs/16-features runs/heads/answers.jsonl --out $runs/16-heads
      [ -f $runs/16-losses/losses.json ] ||
        python $here/16-drafters/losses.py $runs/16-features --out $runs/16-losses
      for seed in 0 1 2; do # speeds are those of the first
        for name in chains trees; do
          sed "s/-0\/drafter/-$seed\/drafter/" $here/16-drafters/bench-$name.yaml > $runs/16-$name-$seed.yaml
          bench 16-$name-$seed $runs/16-$name-$seed.yaml repeats=$((seed ? 1 : 2))
        done
      done
      bench 16-chains-spec $here/16-drafters/bench-chains.yaml prompts.source=spec_bench
      bench 16-chains-compiled $here/16-drafters/bench-chains.yaml target.compile=true
      ;;
  esac
}

# Results are taken over at the end, so that every run sees the checkout as it was.
publish() {
  local to=$here/$1
  case $1 in
    01-core) for kind in batch1 batch8; do cp $runs/01-$kind/results.json "$to/$kind/"; done ;;
    02-heads) for kind in t0 t1 tune; do cp $runs/02-$kind/results.json "$to/$kind/"; done ;;
    04-recipes) cp $runs/04-qlora-bench/results.json "$to/bench-qlora/" ;;
    05-drafters) cp $runs/05-drafters/sweep.json "$to/" ;;
    06-shapes) cp $runs/06-shapes/results.json "$to/" ;;
    07-draft-size)
      cp $runs/07-draft-size/results.json "$to/"
      python "$to/gather.py" runs/size "$to/training.json"
      ;;
    08-sampling)
      cp $runs/08-temperature/sweep.json "$to/temperature.json"
      cp $runs/08-top-p/sweep.json "$to/top-p.json"
      ;;
    09-rules)
      cp $runs/09-chains/sweep.json "$to/chains.json"
      cp $runs/09-trees/sweep.json "$to/trees.json"
      ;;
    10-batch)
      for kind in fixed held-out hostile; do cp $runs/10-$kind/sweep.json "$to/$kind.json"; done
      cp $runs/10-users/suite.json "$to/users.json"
      python "$to/waiting.py" $runs/10-hostile "$to/waiting.json"
      cp $runs/10-plan/plan.json "$to/"
      ;;
    11-prediction)
      cp $runs/11-plan/plan.json "$to/"
      for kind in same fresh; do cp $runs/11-$kind/results.json "$to/$kind.json"; done
      ;;
    12-serving)
      for suite in $suites; do cp $runs/12-$suite/suite.json "$to/$suite.json"; done
      ;;
    13-scaling) cp $runs/13-scaling/scaling.json "$to/" ;;
    14-compiled) cp $runs/14-compiled/results.json "$to/" ;;
    15-engines)
      cp $runs/15-engines/bake-off.json "$to/"
      for run in $runs/15-admitted/*; do cp $run/admission.json "$to/admitted/${run##*/}.json"; done
      ;;
    16-drafters)
      cp $runs/16-losses/losses.json $runs/16-heads/heads.json "$to/"
      for run in 0 1 2 spec compiled; do cp $runs/16-chains-$run/sweep.json "$to/chains-$run.json"; done
      for seed in 0 1 2; do cp $runs/16-trees-$seed/results.json "$to/trees-$seed.json"; done
      ;;
  esac
}

measured=() failed=()
for name in "${names[@]}"; do
  echo "== $name: $(head -n 1 "$here/$name/README.md" | sed 's|^# ||')"
  SECONDS=0
  set +e
  (set -e; measure "$name") # a failure must not stop the other experiments
  status=$?
  set -e
  if [ $status -eq 0 ]; then measured+=("$name"); else failed+=("$name"); fi
  echo "== $name took $SECONDS s, status $status"
done
for name in "${measured[@]}"; do publish "$name"; done
if [ ${#measured[@]} -gt 0 ]; then
  python $here/tables.py "${measured[@]}" .. # and that of the README of the repository
  python $here/plots.py "${measured[@]}"
fi
[ ${#failed[@]} -eq 0 ] || { echo "run_all.sh: failed: ${failed[*]}" >&2; exit 1; }
