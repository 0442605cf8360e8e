#!/usr/bin/env bash
# Set up .venv with the packages for tests, and run them; arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
. tests/environment.sh tests/requirements.txt
exec .venv/bin/python -m pytest tests "$@"
