#!/usr/bin/env bash
# What only a GPU can tell, in under nine minutes on one of 80 GB or more: tests/gpu_checks.py, a few steps of every stage at
# T5-small's, Base's and XL's size, and benchmarks. Writes docs/gpu.md; nothing is fetched, all weights are random.
#   bash tests/gpu.sh           # on a machine with a GPU
#   bash tests/gpu.sh --dry     # on any: the smallest size on the CPU, nothing is written
set -euo pipefail
cd "$(dirname "$0")/.."
# The virtual environment, or whatever Python of the machine has PyTorch.
for python in .venv/bin/python python3 python; do
    if "$python" -c "import torch, transformers, pytest" 2>/dev/null; then
        export HF_HUB_OFFLINE=1 PYTHONPATH=. PYTHONDONTWRITEBYTECODE=1
        exec "$python" tests/benchmarks/gpu.py "$@"
    fi
done
echo "error: no Python here has torch, transformers and pytest; install requirements.txt and tests/requirements.txt" >&2
exit 2
