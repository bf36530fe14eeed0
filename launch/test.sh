#!/usr/bin/env bash
# Install what is needed and run the tests.
# Usage: bash launch/test.sh [pytest arguments]
set -euo pipefail
source "$(dirname "$0")/setup.sh" requirements-dev.txt
exec "$VENV/bin/python" -m pytest -m 'not slow' "$@"
