#!/usr/bin/env bash
# Install what is needed and run the tests.
# Usage: bash launch/test.sh [pytest arguments]
set -euo pipefail
source "$(dirname "$0")/setup.sh" requirements-dev.txt
# Two processes: nearly all of the time is compilation, which uses one core.
exec "$VENV/bin/python" -m pytest -m 'not slow' -n 2 --dist loadfile \
  --nbmake "$@"
