#!/usr/bin/env bash
# Set up .venv and run the checks and the tests. Further arguments go to pytest.
#   bash launch/test.sh           everything
#   bash launch/test.sh --quick   without the tests that are marked slow
set -euo pipefail
cd "$(dirname "$0")/.."
tests=()
if [ "${1:-}" = --quick ]; then
  tests=(-m "not slow")
  shift
fi
source launch/environment.sh
prepare_environment test
ruff check .
ruff format --check .
python -m mypy --num-workers 2
lint-imports
# Two processes: most tests keep one core busy. The same examples of the property tests at each run: python -m pytest
# draws new ones.
python -m pytest -n 2 --dist worksteal --hypothesis-seed=0 ${tests[@]+"${tests[@]}"} "$@"
