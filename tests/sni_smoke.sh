#!/usr/bin/env bash
# Every stage on real Super-NaturalInstructions with a small T5 of random weights, to the table; minutes on two cores.
#   bash tests/sni_smoke.sh [the data's folder; default: natural-instructions]
set -euo pipefail
cd "$(dirname "$0")/.."
data=${1:-natural-instructions}
. tests/environment.sh
export OMP_NUM_THREADS=1

run() {
    echo; echo "\$ $*"
    .venv/bin/"$@"
}

begin=$SECONDS
run python tests/random_t5.py runs/sni-smoke/t5 --data "$data"
options="--config configs/sni-smoke.yaml --data $data"
run torchrun --standalone --nproc-per-node 2 train_teacher.py $options
run torchrun --standalone --nproc-per-node 2 train_hyper.py --stage pretrain $options
run torchrun --standalone --nproc-per-node 2 train_hyper.py --stage finetune $options
run python evaluate.py --bench sni $options
echo; echo "smoke on real data: $((SECONDS - begin)) s"
