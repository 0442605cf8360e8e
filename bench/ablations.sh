#!/usr/bin/env bash
# Table 4 of the paper: finetuning is trained again without each part, from several seeds.
# A part is left out of the training, never switched off after it. What is finished is kept, so
# a run that was cut off goes on where it stopped. Change any of these by the environment, as in
#   SEEDS=1 BENCH=sni CONFIG=configs/sni-base.yaml RUNS=runs/sni-base bash bench/ablations.sh
set -euo pipefail
cd "$(dirname "$0")/.."
SEEDS=${SEEDS:-3}
PROCESSES=${PROCESSES:-2}                       # that train together
CONFIG=${CONFIG:-configs/sample.yaml}
RUNS=${RUNS:-runs/sample}                       # of seed 0; seed 1's are in $RUNS-seed1, and so on
BENCH=${BENCH:-sample}
SPLIT=${SPLIT:-test}
ONLY=${ONLY:-}                                  # "without-kl without-ins": these alone; default: all
. tests/environment.sh

run() {
    echo; echo "\$ $*"
    .venv/bin/"$@"
}

# ablation NAME OPTION...: train finetuning with these options, and score it.
ablation() {
    local name=$1
    shift
    if [[ -n $ONLY && " $ONLY " != *" $name "* ]]; then return; fi
    run $launch train_hyper.py --stage finetune --name "finetune-$name" $options "$@"
    run $launch evaluate.py --bench "$BENCH" --rows tagi --checkpoint "$runs/finetune-$name" \
        --out "$runs/evaluate-$SPLIT-$name" --split "$SPLIT" $options
}

launch="python -m bench.launch --nproc-per-node $PROCESSES"
for ((seed = 0; seed < SEEDS; seed++)); do
    runs=$RUNS
    if ((seed > 0)); then runs=$RUNS-seed$seed; fi
    options="--config $CONFIG --runs $runs --seed $seed"

    # The whole method, with all other rows of the table.
    run $launch train_teacher.py $options
    run $launch train_hyper.py --stage pretrain $options
    run $launch train_hyper.py --stage finetune $options
    run $launch evaluate.py --bench "$BENCH" --checkpoint "$runs/finetune" \
        --out "$runs/evaluate-$SPLIT" --split "$SPLIT" --no-cost $options

    ablation without-pretraining --no-pretrained
    ablation without-fusion --fusion none
    ablation without-pred --lambda-ce 0
    ablation without-kl --lambda-kl 0
    ablation without-ins --lambda-ins 0
    ablation without-hypernetwork --generator none

    # What L_ins compares. One of these is the whole method's own, and trained again as it was.
    ablation with-product --alignment product
    ablation with-factors --alignment factors
    ablation with-svd --alignment svd
done
run python evaluate.py --ablations --config "$CONFIG" --runs "$RUNS" --split "$SPLIT"
