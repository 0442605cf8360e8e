#!/usr/bin/env bash
# Set up .venv with the packages for tests, and run them; arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
more_packages=tests/requirements.txt
. tests/environment.sh
exec .venv/bin/python -m pytest tests "$@"
