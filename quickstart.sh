#!/usr/bin/env bash
# The whole method on the built-in suite, from the T5 in assets/ to the table and an answer.
#   --from-scratch   train that T5 first, as the one in assets/ was (half an hour or more)
#   --fresh          start over; without it a second run skips what is done
set -euo pipefail
cd "$(dirname "$0")"
fresh= runs=runs/sample llm=
for word in "$@"; do
    case $word in
        --fresh) fresh=--fresh ;;
        --from-scratch) runs=runs/from-scratch llm="--meta-model runs/from-scratch/meta" ;;
        *)
            echo "error: unknown option $word; quickstart.sh takes --from-scratch and --fresh" >&2
            exit 2 ;;
    esac
done
. tests/environment.sh

export OMP_NUM_THREADS=1    # two processes with one thread each beat one with two on a small model

run() {
    echo; echo "\$ $*"
    local begin=$SECONDS
    .venv/bin/"$@"
    echo "($((SECONDS - begin)) s)"
}

begin=$SECONDS options="--runs $runs $llm $fresh"
train="python -m bench.launch --nproc-per-node 2"
if [ -n "$fresh" ] || [ ! -d data/sample ]; then
    run python -m bench.sample
fi
if [ -n "$llm" ]; then
    run $train train_teacher.py --stage base $options
    run $train train_teacher.py --stage meta $options
fi
run $train train_teacher.py $options
run $train train_hyper.py --stage pretrain $options
run $train train_hyper.py --stage finetune $options
unset OMP_NUM_THREADS       # one process: with all cores
run python evaluate.py --bench sample --checkpoint $runs/finetune --out $runs/evaluate $fresh

# A half-trained model, or one that does not follow the instruction, ends here with exit code 1.
.venv/bin/python - $runs/evaluate/results.json <<'END'
import json
import sys

missed = []
results = json.load(open(sys.argv[1]))["results"]
for demos, at in ((0, "Def"), (2, "Def + 2 Pos")):
    score = {r["key"]: r["exact_match"] for r in results if r["demos"] == demos}
    tagi, shuffled, meta = score["tagi"], score["tagi_shuffled"], score["meta"]
    if meta < 95:
        missed.append(f"{at}: the meta-trained row's exact match of {meta:.1f} is below 95")
    if tagi < 0.95 * meta:
        missed.append(f"{at}: TAGI's exact match of {tagi:.1f} is less than 0.95 times the "
                      f"meta-trained row's {meta:.1f}")
    if tagi < shuffled + 80:
        missed.append(f"{at}: TAGI's exact match of {tagi:.1f} is less than 80 above the "
                      f"{shuffled:.1f} with the shuffled instruction")
if missed:
    sys.exit("\n".join(missed))
END

run python adapt.py --checkpoint $runs/finetune \
    --instruction "Which city is it? Put it in quotes." \
    --input "On Monday Anna the baker bought a red lamp in Paris."
echo; echo "quick start: $((SECONDS - begin)) s"
