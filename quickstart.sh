#!/usr/bin/env bash
# The whole method on the built-in suite, from the T5 in assets/ to the table and an answer to an own instruction.
#   --from-scratch   train that T5 first, as the one in assets/ was (about an hour)
#   --fresh          start over; without it a second run skips what is done
set -euo pipefail
cd "$(dirname "$0")"
fresh= runs=runs/sample llm=
for word in "$@"; do
    case $word in
        --fresh) fresh=--fresh ;;
        --from-scratch) runs=runs/from-scratch llm="--meta-model runs/from-scratch/meta" ;;
        *) echo "error: unknown option $word; quickstart.sh takes --from-scratch and --fresh" >&2; exit 2 ;;
    esac
done
. tests/environment.sh

export OMP_NUM_THREADS=1    # two processes with one thread each; for a model this small that beats one with two

run() {
    echo; echo "\$ $*"
    local begin=$SECONDS
    .venv/bin/"$@"
    echo "($((SECONDS - begin)) s)"
}

begin=$SECONDS options="--runs $runs $llm $fresh"
train="torchrun --standalone --nproc-per-node 2"
if [ -n "$fresh" ] || [ ! -d data/sample ]; then
    run python sample.py
fi
if [ -n "$llm" ]; then
    run $train train_teacher.py --stages base,meta $options
fi
run $train train_teacher.py $options
run $train train_hyper.py --stage pretrain $options
run $train train_hyper.py --stage finetune $options
unset OMP_NUM_THREADS       # one process: with all cores
run python evaluate.py --bench sample --checkpoint $runs/finetune --floor-meta 95 --floor-share 0.95 --floor-margin 80 \
    --cost-repeats 2 $fresh
run python evaluate.py --checkpoint $runs/finetune --instruction "Which city is it? Put it in quotes." \
    --input "On Monday Anna the baker bought a red lamp in Paris."
echo; echo "quick start: $((SECONDS - begin)) s"
