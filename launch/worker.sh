#!/usr/bin/env bash
# Run the process of one host of a TPU pod; `tpu_pod.sh` starts it on each.
# Usage: bash launch/worker.sh WORKDIR CACHE [arguments of vfm_jax.main ...]
# Leaves ~/vfm_jax_log.txt and, when it has ended, its status in
# ~/vfm_jax_status.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2
WORKDIR="$1" CACHE="$2"
shift 2
rm -f ~/vfm_jax_status
{
  mkdir -p "$WORKDIR" "$CACHE" &&
    env VFM_JAX_DISTRIBUTED=1 "JAX_COMPILATION_CACHE_DIR=$CACHE" \
      ~/vfm_jax_env/bin/python -m vfm_jax.main "$@" "--workdir=$WORKDIR"
} >>~/vfm_jax_log.txt 2>&1
echo $? >~/vfm_jax_status
