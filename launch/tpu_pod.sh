#!/usr/bin/env bash
# Train on a TPU pod slice of Google Cloud, on all of its hosts.
# Usage: bash launch/tpu_pod.sh [--dry] --name NAME --zone ZONE
#   --type v5litepod-256 --config FILE[:variant] --workdir DIR
#   [--bucket BUCKET] [--cache DIR] [--project P] [--runtime VERSION] [--spot]
#   [--restarts N] [--start-timeout S] [--keep] [-- --config.a.b=value ...]
#
# --name           of the queued resource, its node, and the folder of logs
# --type           accelerator type, as gcloud has it
# --workdir        on a file system that all hosts share; a run that is started
#                  again goes on there
# --bucket         of Cloud Storage, mounted on each host as ~/bucket with
#                  gcsfuse: --workdir '~/bucket/runs/NAME'
# --cache          compiled programs, DIR/compiled of the workdir by default
# --runtime        image of the hosts, v2-alpha-tpuv5-lite by default
# --spot           may be taken away; the run is then queued again
# --restarts       how often, 10 by default
# --start-timeout  seconds until every host must run, 600 by default
# --keep           leave the slice there when the run has ended
# --dry            print the commands and run nothing
#
# Logs of all hosts are collected in runs/NAME/logs. Hosts that do not start, or
# fail, are named, and the launch fails.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/lib.sh

NAME='' ZONE='' TYPE='' CONFIG='' WORKDIR='' BUCKET='' CACHE='' PROJECT=''
RUNTIME=v2-alpha-tpuv5-lite SPOT=0 RESTARTS=10 START_TIMEOUT=600 KEEP=0
while [ $# -gt 0 ]; do
  case "$1" in
    --dry) DRY=1 ;;
    --help) usage ;;
    --spot) SPOT=1 ;;
    --keep) KEEP=1 ;;
    --name) NAME="${2:?}" && shift ;;
    --zone) ZONE="${2:?}" && shift ;;
    --type) TYPE="${2:?}" && shift ;;
    --config) CONFIG="${2:?}" && shift ;;
    --workdir) WORKDIR="${2:?}" && shift ;;
    --bucket) BUCKET="${2:?}" && shift ;;
    --cache) CACHE="${2:?}" && shift ;;
    --project) PROJECT="${2:?}" && shift ;;
    --runtime) RUNTIME="${2:?}" && shift ;;
    --restarts) RESTARTS="${2:?}" && shift ;;
    --start-timeout) START_TIMEOUT="${2:?}" && shift ;;
    --) shift && break ;;
    *) fail "unknown argument $1; see --help" ;;
  esac
  shift
done
need NAME ZONE TYPE CONFIG WORKDIR
CACHE="${CACHE:-$WORKDIR/compiled}"
POLL="${POLL:-30}"
LOGS="runs/$NAME/logs"
show_commands

where=("--zone=$ZONE")
[ -z "$PROJECT" ] || where+=("--project=$PROJECT")
tpu=(gcloud compute tpus)

# Run a command on all hosts; $1 is `run` or `ask`.
on_all() {
  "$1" "${tpu[@]}" tpu-vm ssh "$NAME" "${where[@]}" --worker=all \
    --batch-size=all --command="$2"
}

request() {
  local options=("--node-id=$NAME" "--accelerator-type=$TYPE"
    "--runtime-version=$RUNTIME")
  [ "$SPOT" = 0 ] || options+=(--spot)
  run "${tpu[@]}" queued-resources create "$NAME" "${where[@]}" "${options[@]}"
}

release() {
  run "${tpu[@]}" queued-resources delete "$NAME" "${where[@]}" --force --quiet
}

state() {
  ask "${tpu[@]}" queued-resources describe "$NAME" "${where[@]}" \
    '--format=value(state.state)'
}

# Install the working tree and what it needs; mount the bucket.
prepare() {
  run git archive --output=/tmp/vfm_jax.tar HEAD
  run "${tpu[@]}" tpu-vm scp /tmp/vfm_jax.tar "$NAME:" "${where[@]}" \
    --worker=all
  local steps='set -e; mkdir -p vfm_jax; tar -xf vfm_jax.tar -C vfm_jax'
  steps+='; [ -d vfm_jax_env ] || python3 -m venv vfm_jax_env'
  steps+="; vfm_jax_env/bin/pip install --quiet -e 'vfm_jax[tpu]'"
  if [ -n "$BUCKET" ]; then
    steps+='; mkdir -p bucket; mountpoint -q bucket'
    steps+=" || gcsfuse --implicit-dirs $(quoted "$BUCKET") bucket"
  fi
  on_all run "$steps"
}

# The workdir may begin with ~, which is that of the hosts.
remote_path() {
  case "$1" in
    '~/'*) echo "~/$(quoted "${1#'~/'}")" ;;
    *) quoted "$1" ;;
  esac
}

start() {
  local arguments
  arguments="$(quoted train "--config=$CONFIG" "$@")"
  on_all run "cd vfm_jax && setsid nohup bash launch/worker.sh \
$(remote_path "$WORKDIR") $(remote_path "$CACHE") $arguments \
>/dev/null 2>&1 </dev/null &"
}

# Print one line a host: its number, and `running`, `absent` or `ended STATUS`.
ABOUT=http://metadata.google.internal/computeMetadata/v1/instance/attributes
ASK="n=\$(curl -s -H Metadata-Flavor:Google $ABOUT/agent-worker-number)"
ASK+='; if [ -f vfm_jax_status ]; then echo host "$n" ended $(cat vfm_jax_status)'
ASK+='; elif pgrep -f vfm_jax[.]main >/dev/null; then echo host "$n" running'
ASK+='; else echo host "$n" absent; fi'

hosts() {
  on_all ask "$ASK" | grep '^host ' | sort -k2n || true
}

collect() {
  run mkdir -p "$LOGS"
  run "${tpu[@]}" tpu-vm ssh "$NAME" "${where[@]}" --worker=all \
    --batch-size=all "--output-directory=$LOGS" \
    --command='tail -n 2000 vfm_jax_log.txt'
}

if [ "$DRY" = 1 ]; then
  request
  state
  prepare
  start "$@"
  on_all ask "$ASK"
  collect
  release
  exit
fi

# Wait until the slice is there; it may stand in the queue for hours.
await_slice() {
  local now
  while true; do
    now="$(state)"
    case "$now" in
      ACTIVE) return ;;
      FAILED | SUSPENDED) fail "the request for $NAME is $now" ;;
    esac
    sleep "$POLL"
  done
}

# Fail with the names of the hosts that do not run in time.
await_start() {
  local count deadline found missing n
  count="$(run "${tpu[@]}" tpu-vm describe "$NAME" "${where[@]}" \
    '--format=value(networkEndpoints[].ipAddress)' | tr ';' '\n' | grep -c .)"
  deadline=$((SECONDS + START_TIMEOUT))
  while true; do
    found="$(hosts)"
    missing=()
    for ((n = 0; n < count; n++)); do
      grep -qE "^host $n (running|ended 0)" <<<"$found" || missing+=("$n")
    done
    [ ${#missing[@]} -gt 0 ] || return 0
    if [ "$SECONDS" -ge "$deadline" ]; then
      collect || true
      fail "of $count hosts these do not run after $START_TIMEOUT s:" \
        "${missing[*]}; logs are in $LOGS"
    fi
    sleep "$POLL"
  done
}

# Return 0 when the run has ended well, 1 when the slice was taken away.
watch_run() {
  local found failed
  while true; do
    case "$(state || echo GONE)" in
      ACTIVE) ;;
      *) return 1 ;;
    esac
    found="$(hosts)"
    failed="$(grep -E ' ended [1-9]| absent' <<<"$found" || true)"
    if [ -n "$failed" ]; then
      # A host that goes away with the slice is no failure of the run.
      sleep "$POLL"
      [ "$(state || echo GONE)" = ACTIVE ] || return 1
      collect || true
      fail "these hosts failed; logs are in $LOGS: ${failed//$'\n'/, }"
    fi
    if [ -n "$found" ] && ! grep -qv ' ended 0' <<<"$found"; then
      return 0
    fi
    sleep "$POLL"
  done
}

for ((attempt = 0; attempt <= RESTARTS; attempt++)); do
  if ! state >/dev/null 2>&1; then
    request
  fi
  await_slice
  prepare
  start "$@"
  await_start
  if watch_run; then
    collect
    [ "$KEEP" = 1 ] || release
    exit 0
  fi
  echo "$NAME was taken away; restart $((attempt + 1)) of $RESTARTS" >&2
  release || true
done
fail "$NAME was taken away more than $RESTARTS times"
