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

run() {
    echo; echo "\$ python $*"
    .venv/bin/python "$@"
}

begin=$SECONDS
if [ -n "$fresh" ] || [ ! -d data/sample ]; then
    run sample.py
fi
run train_teacher.py $fresh
run train_hyper.py --stage pretrain $fresh
run train_hyper.py --stage finetune $fresh
run evaluate.py --bench sample --checkpoint runs/sample/finetune --floor 45 --floor-margin 40
echo; echo "quick start: $((SECONDS - begin)) s"
