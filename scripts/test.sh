#!/usr/bin/env bash
# Format, lint, types and tests: ./scripts/test.sh [pytest flags].
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/setup.sh
.venv/bin/ruff format --check .
.venv/bin/ruff check .
.venv/bin/mypy & # beside the tests, which leave a third of the machine idle
types=$!
export OMP_NUM_THREADS=1 # each worker's engine has a core to itself, and no more
# Files go to the workers whole, because their tests share engines, and in this order, the longest first.
.venv/bin/python -m pytest -n auto --dist loadfile --no-loadscope-reorder "$@"
wait "$types"
