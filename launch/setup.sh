# Make the project's virtual environment; sourced by quickstart.sh and test.sh.
# Usage: source launch/setup.sh REQUIREMENTS_FILE
# Reads: PYTHON (interpreter to use), VENV (where the environment goes).

cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1

find_python() {
  local candidate
  for candidate in ${PYTHON:-} python3.12 python3.11 python3.13 python3 python; do
    command -v "$candidate" >/dev/null 2>&1 || continue
    if "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null; then
      command -v "$candidate"
      return
    fi
  done
  echo "vfm_jax needs Python 3.11, 3.12 or 3.13, and none was found." >&2
  echo "Install one, or name it: PYTHON=/path/to/python3.11 bash launch/..." >&2
  return 1
}

VENV="${VENV:-.venv}"
if [ ! -x "$VENV/bin/python" ]; then
  python="$(find_python)" || exit 1
  "$python" -m venv "$VENV" || {
    echo "$python cannot make virtual environments (on Debian and Ubuntu:" \
      "apt-get install python3-venv)." >&2
    rm -rf "$VENV"
    exit 1
  }
fi

# Install once for each state of the requirements; a second run starts at once.
stamp="$VENV/.installed-$(cat "$1" pyproject.toml | cksum | cut -d' ' -f1)"
if [ ! -f "$stamp" ]; then
  "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check \
    -r "$1" || exit 1
  "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check \
    --no-deps -e . || exit 1
  touch "$stamp"
fi

export JAX_PLATFORMS="${JAX_PLATFORMS:-}"
# glibc gives the memory of a training step back to the system after each step
# and asks for it again. One arena that is never trimmed keeps it, in large
# pages: together a fifth less time a step on CPU (table in the README).
export MALLOC_ARENA_MAX="${MALLOC_ARENA_MAX:-1}"
export MALLOC_MMAP_THRESHOLD_="${MALLOC_MMAP_THRESHOLD_:-8589934592}"
export MALLOC_TRIM_THRESHOLD_="${MALLOC_TRIM_THRESHOLD_:-17179869184}"
export GLIBC_TUNABLES="${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}"
