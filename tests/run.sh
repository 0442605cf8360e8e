#!/usr/bin/env bash
# Set up .venv with the packages for tests, and run them in two processes; arguments go to pytest (-n 0: in one).
set -euo pipefail
cd "$(dirname "$0")/.."
more_packages=tests/requirements.txt
. tests/environment.sh
exec .venv/bin/python -m pytest -n 2 --dist loadfile tests "$@"
