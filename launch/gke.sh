#!/usr/bin/env bash
# Train on TPU slices of a GKE cluster that has the JobSet controller.
# Usage: bash launch/gke.sh [--dry] --name NAME --image IMAGE --bucket BUCKET
#   --accelerator tpu-v5-lite-podslice --topology 16x16 --config FILE[:variant]
#   --workdir /bucket/DIR [--slices N] [--chips N] [--cache DIR] [--restarts N]
#   [--service-account NAME] [--start-timeout S] [-- --config.a.b=value ...]
#
# --image          has the project in its working directory, and the extra `tpu`
# --bucket         of Cloud Storage, mounted as /bucket in each pod
# --chips          of a host, 4 by default
# --cache          compiled programs, DIR/compiled of the workdir by default
# --start-timeout  seconds until every pod must run, 1800 by default
# --dry            print what would be applied and the commands; run nothing
#
# Pods that do not run in time are named, and the launch fails.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/lib.sh

NAME='' IMAGE='' BUCKET='' ACCELERATOR='' TOPOLOGY='' CONFIG='' WORKDIR=''
SLICES=1 CHIPS=4 CACHE='' RESTARTS=10 SERVICE_ACCOUNT=default
START_TIMEOUT=1800
while [ $# -gt 0 ]; do
  case "$1" in
    --dry) DRY=1 ;;
    --help) usage ;;
    --name) NAME="${2:?}" && shift ;;
    --image) IMAGE="${2:?}" && shift ;;
    --bucket) BUCKET="${2:?}" && shift ;;
    --accelerator) ACCELERATOR="${2:?}" && shift ;;
    --topology) TOPOLOGY="${2:?}" && shift ;;
    --config) CONFIG="${2:?}" && shift ;;
    --workdir) WORKDIR="${2:?}" && shift ;;
    --slices) SLICES="${2:?}" && shift ;;
    --chips) CHIPS="${2:?}" && shift ;;
    --cache) CACHE="${2:?}" && shift ;;
    --restarts) RESTARTS="${2:?}" && shift ;;
    --service-account) SERVICE_ACCOUNT="${2:?}" && shift ;;
    --start-timeout) START_TIMEOUT="${2:?}" && shift ;;
    --) shift && break ;;
    *) fail "unknown argument $1; see --help" ;;
  esac
  shift
done
need NAME IMAGE BUCKET ACCELERATOR TOPOLOGY CONFIG WORKDIR
CACHE="${CACHE:-$WORKDIR/compiled}"
POLL="${POLL:-15}"
show_commands

[[ "$TOPOLOGY" =~ ^[0-9]+(x[0-9]+)+$ ]] ||
  fail "expected --topology like 16x16, found $TOPOLOGY"
total=$((${TOPOLOGY//x/*}))
[ $((total % CHIPS)) = 0 ] ||
  fail "--chips $CHIPS does not divide the $total chips of $TOPOLOGY"
HOSTS=$((total / CHIPS))

# A word as a string of JSON, which is one of YAML too.
json() {
  local word="${1//\\/\\\\}"
  printf '"%s"' "${word//\"/\\\"}"
}
words=(python -m vfm_jax.main train "--config=$CONFIG" "--workdir=$WORKDIR" "$@")
COMMAND=''
for word in "${words[@]}"; do
  COMMAND+="${COMMAND:+, }$(json "$word")"
done
COMMAND="[$COMMAND]"
IMAGE="$(json "$IMAGE")" CACHE="$(json "$CACHE")"

filled="$(cat launch/gke.yaml)"
for name in NAME IMAGE BUCKET ACCELERATOR TOPOLOGY SLICES CHIPS HOSTS CACHE \
  RESTARTS SERVICE_ACCOUNT COMMAND; do
  filled="${filled//"\${$name}"/"${!name}"}"
done

pods() {
  ask kubectl get pods "--selector=jobset.sigs.k8s.io/jobset-name=$NAME" \
    '--output=jsonpath={range .items[*]}{.metadata.labels.jobset\.sigs\.k8s\.io/job-index}{"/"}{.metadata.annotations.batch\.kubernetes\.io/job-completion-index}{" "}{.status.phase}{"\n"}{end}'
}

if [ "$DRY" = 1 ]; then
  echo "$filled"
  run kubectl apply --filename=-
  pods
  run kubectl logs "--selector=jobset.sigs.k8s.io/jobset-name=$NAME" \
    --prefix --follow --max-log-requests=$((SLICES * HOSTS))
  exit
fi

run kubectl apply --filename=- <<<"$filled"
deadline=$((SECONDS + START_TIMEOUT))
while true; do
  found="$(pods || true)"
  missing=()
  for ((slice = 0; slice < SLICES; slice++)); do
    for ((host = 0; host < HOSTS; host++)); do
      grep -qE "^$slice/$host (Running|Succeeded)" <<<"$found" ||
        missing+=("$slice/$host")
    done
  done
  [ ${#missing[@]} -gt 0 ] || break
  [ "$SECONDS" -lt "$deadline" ] ||
    fail "these pods (slice/host) do not run after $START_TIMEOUT s:" \
      "${missing[*]}; see kubectl describe jobset $NAME"
  sleep "$POLL"
done
run kubectl logs "--selector=jobset.sigs.k8s.io/jobset-name=$NAME" \
  --prefix --follow --max-log-requests=$((SLICES * HOSTS))
