#!/usr/bin/env bash
# Train on the GPUs of this machine.
# Usage: bash launch/gpu_local.sh [--dry] --config FILE[:variant] --workdir DIR
#   [--cache DIR] [--processes N] [--port N] [-- --config.a.b=value ...]
#
# --workdir    checkpoints, metrics and logs; a second start goes on from there
# --cache      compiled programs, DIR/compiled of the workdir by default
# --processes  1 by default, for all GPUs; else each has its share of them
# --port       of process 0, for several processes; 9876 by default
# --dry        print the commands and run nothing
#
# Of several processes the first that fails is named and ends the others.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/lib.sh

CONFIG='' WORKDIR='' CACHE='' PROCESSES=1 PORT=9876
while [ $# -gt 0 ]; do
  case "$1" in
    --dry) DRY=1 ;;
    --help) usage ;;
    --config) CONFIG="${2:?}" && shift ;;
    --workdir) WORKDIR="${2:?}" && shift ;;
    --cache) CACHE="${2:?}" && shift ;;
    --processes) PROCESSES="${2:?}" && shift ;;
    --port) PORT="${2:?}" && shift ;;
    --) shift && break ;;
    *) fail "unknown argument $1; see --help" ;;
  esac
  shift
done
need CONFIG WORKDIR
CACHE="${CACHE:-$WORKDIR/compiled}"
show_commands

PYTHON="${PYTHON:-python}"
train=("$PYTHON" -m vfm_jax.main train "--config=$CONFIG" "--workdir=$WORKDIR" "$@")
shared=("JAX_COMPILATION_CACHE_DIR=$CACHE" JAX_PLATFORMS=cuda)

if [ "$PROCESSES" = 1 ]; then
  run env "${shared[@]}" "${train[@]}"
  exit
fi

gpus="${GPUS:-}"
if [ -z "$gpus" ]; then
  command -v nvidia-smi >/dev/null ||
    fail "cannot count the GPUs without nvidia-smi; give GPUS=8"
  gpus="$(nvidia-smi --list-gpus | wc -l)"
fi
[ $((gpus % PROCESSES)) = 0 ] ||
  fail "--processes $PROCESSES does not divide $gpus GPUs"
each=$((gpus / PROCESSES))

pids=()
for ((i = 0; i < PROCESSES; i++)); do
  visible="$(seq -s, $((i * each)) $((i * each + each - 1)))"
  command=(env "${shared[@]}" "CUDA_VISIBLE_DEVICES=$visible" "${train[@]}"
    "--coordinator=localhost:$PORT" "--num_processes=$PROCESSES"
    "--process_id=$i")
  show "${command[@]}"
  [ "$DRY" = 0 ] || continue
  mkdir -p "$WORKDIR/logs"
  # Not through a function, whose shell would get the signals instead.
  "${command[@]}" >"$WORKDIR/logs/process_$i.txt" 2>&1 &
  pids+=($!)
done
[ "$DRY" = 0 ] || exit 0

stop() { kill -TERM "${pids[@]}" 2>/dev/null || true; }
trap stop TERM INT

# Wait for each in turn of ending, and say which one failed first.
left=${#pids[@]}
failed=0
while [ "$left" -gt 0 ]; do
  status=0
  wait -n -p ended "${pids[@]}" || status=$?
  # A signal to this script ends the wait early.
  [ -n "${ended:-}" ] || continue
  left=$((left - 1))
  for i in "${!pids[@]}"; do
    [ "${pids[$i]}" = "$ended" ] || continue
    unset "pids[$i]"
    if [ "$status" != 0 ] && [ "$failed" = 0 ]; then
      failed=$status
      echo "process $i failed with status $status; the end of its log:" >&2
      tail -n 20 "$WORKDIR/logs/process_$i.txt" >&2
      stop
    fi
  done
done
exit "$failed"
