#!/usr/bin/env bash
# The whole method on the built-in suite, from nothing to the table. A second run skips what is done; --fresh starts over.
set -euo pipefail
cd "$(dirname "$0")"
fresh=${1:-}
if [ -n "$fresh" ] && [ "$fresh" != --fresh ]; then
    echo "error: unknown option $fresh; quickstart.sh takes --fresh or nothing" >&2
    exit 2
fi
. tests/environment.sh

export OMP_NUM_THREADS=1    # two processes with one thread each; for a model this small that beats one with two

run() {
    echo; echo "\$ $*"
    .venv/bin/"$@"
}

begin=$SECONDS
if [ -n "$fresh" ] || [ ! -d data/sample ]; then
    run python sample.py
fi
run torchrun --standalone --nproc-per-node 2 train_teacher.py $fresh
run torchrun --standalone --nproc-per-node 2 train_hyper.py --stage pretrain $fresh
run torchrun --standalone --nproc-per-node 2 train_hyper.py --stage finetune $fresh
run python evaluate.py --bench sample --checkpoint runs/sample/finetune --floor 70 --floor-margin 50 $fresh
echo; echo "quick start: $((SECONDS - begin)) s"
