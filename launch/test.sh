#!/usr/bin/env bash
# Set up .venv and run the checks and the tests. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/environment.sh
prepare_environment test
ruff check .
ruff format --check .
python -m mypy
lint-imports
python -m pytest "$@"
