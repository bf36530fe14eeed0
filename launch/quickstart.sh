#!/usr/bin/env bash
# Install what is needed and train a masked video encoder on real clips.
# Usage: bash launch/quickstart.sh [--config=configs/quickstart.py:mocap ...]
# Results (table, curves, pictures, checkpoints) go to runs/quickstart.
set -euo pipefail
source "$(dirname "$0")/setup.sh" requirements.txt
exec "$VENV/bin/python" -m vfm_jax.main study \
  --config=configs/quickstart.py --workdir=runs/quickstart --seeds=0,1,2 "$@"
