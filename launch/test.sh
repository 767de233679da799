#!/usr/bin/env bash
# Runs the tests in an environment of their own making: bash launch/test.sh [pytest arguments]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
prepare test
echo "== running the tests"
exec .venv/bin/python -m pytest --numprocesses=3 --dist=loadfile --no-loadscope-reorder "$@"
