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
. tests/environment.sh

run() {
    echo; echo "\$ $*"
    .venv/bin/"$@"
}

# ablation NAME OPTION...: train finetuning with these options, and score it.
ablation() {
    local name=$1
    shift
    run $train train_hyper.py --stage finetune --name "$name" $options "$@"
    run python evaluate.py --bench "$BENCH" --rows tagi --checkpoint "$runs/$name" \
        --out "$runs/evaluate-$name" --split "$SPLIT" $options
}

train="python -m bench.launch --nproc-per-node $PROCESSES"
for ((seed = 0; seed < SEEDS; seed++)); do
    runs=$RUNS
    if ((seed > 0)); then runs=$RUNS-seed$seed; fi
    options="--config $CONFIG --runs $runs --seed $seed"

    # The whole method, with all other rows of the table.
    run $train train_teacher.py $options
    run $train train_hyper.py --stage pretrain $options
    run $train train_hyper.py --stage finetune $options
    run python evaluate.py --bench "$BENCH" --checkpoint "$runs/finetune" \
        --out "$runs/evaluate-finetune" --split "$SPLIT" $options

    ablation finetune-without-pretraining --no-pretrained
    ablation finetune-without-fusion --fusion none
    ablation finetune-without-pred --lambda-ce 0
    ablation finetune-without-kl --lambda-kl 0
    ablation finetune-without-ins --lambda-ins 0
    ablation finetune-without-hypernetwork --generator none

    # What L_ins compares. One of these is the whole method's own, and trained again as it was.
    ablation finetune-with-product --alignment product
    ablation finetune-with-factors --alignment factors
    ablation finetune-with-svd --alignment svd
done
run python evaluate.py --ablations --config "$CONFIG" --runs "$RUNS" --split "$SPLIT"
