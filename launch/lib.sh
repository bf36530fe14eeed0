# What the launchers share; sourced by them.

DRY=0

# Print a command as it could be typed.
show() {
  {
    printf '+'
    printf ' %q' "$@"
    printf '\n'
  } >&"$SHOWN"
}

# Print a command, and run it unless --dry was given.
run() {
  show "$@"
  if [ "$DRY" = 0 ]; then
    "$@"
  fi
}

# As `run`, for a question that is asked again and again: printed with --dry only.
ask() {
  if [ "$DRY" = 1 ]; then
    run "$@"
  else
    "$@"
  fi
}

# Print commands to standard output with --dry, else to standard error.
show_commands() {
  SHOWN=2
  if [ "$DRY" = 1 ]; then
    SHOWN=1
  fi
}

fail() {
  echo "$(basename "$0"): $*" >&2
  exit 2
}

# Print the comment at the head of a script, which is its manual.
usage() {
  sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"
  exit 0
}

# Fail unless each of the named variables has a value; they are set by flags of
# the same name in lower case.
need() {
  local name flag
  for name in "$@"; do
    flag="--$(tr '[:upper:]_' '[:lower:]-' <<<"$name")"
    [ -n "${!name}" ] || fail "$flag is needed; see --help"
  done
}

# Quote words for a shell on another machine.
quoted() {
  local out
  printf -v out ' %q' "$@"
  echo "${out# }"
}
