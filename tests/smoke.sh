#!/usr/bin/env bash
# Every stage on real data with a small T5 of random weights, to the table; minutes on two cores.
#   bash tests/smoke.sh sni [the data's folder; default: natural-instructions]
#   bash tests/smoke.sh p3 [default: p3]
#   bash tests/smoke.sh sni FOLDER --fresh      starts over
set -euo pipefail
cd "$(dirname "$0")/.."
case ${1:-} in
    sni) data=${2:-natural-instructions} ;;
    p3) data=${2:-p3} ;;
    *) echo "error: bash tests/smoke.sh sni|p3 [folder [--fresh]]" >&2; exit 2 ;;
esac
case ${3:-} in
    ""|--fresh) ;;
    *) echo "error: unknown option $3; after the folder there may be --fresh" >&2; exit 2 ;;
esac
. tests/environment.sh
export OMP_NUM_THREADS=1

run() {
    echo; echo "\$ $*"
    .venv/bin/"$@"
}

begin=$SECONDS
run python tests/random_t5.py "runs/$1-smoke/t5" --data "$data" --format "$1"
options="--config configs/$1-smoke.yaml --data $data ${3:-}"
run torchrun --standalone --nproc-per-node 2 train_teacher.py $options
run torchrun --standalone --nproc-per-node 2 train_hyper.py --stage pretrain $options
run torchrun --standalone --nproc-per-node 2 train_hyper.py --stage finetune $options
run python evaluate.py --bench "$1" $options
echo; echo "smoke on real data, $1: $((SECONDS - begin)) s"
