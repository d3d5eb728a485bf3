#!/usr/bin/env bash
# Create the Python environment of a node. Can be run again at any time: a complete environment is not changed. Variables:
# VENV (default ~/dinov2-venv), PYTHON (default python3).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
fail() { echo "error: $*" >&2; exit 1; }
VENV=${VENV:-$HOME/dinov2-venv}

# VENV.made stores the recipe from which VENV was created; an environment without it belongs to the user and is not changed
made=$VENV.made
if [ -e "$VENV" ] && [ ! -e "$made" ]; then
  "$VENV/bin/python" -c 'import dinov2_custom, torch' ||
    fail "expected VENV=$VENV to have dinov2_custom, got an environment without it; install it, or choose another VENV"
  exit
fi
mkdir -p "$(dirname "$VENV")"
exec 9>>"$VENV.lock"
flock 9   # several nodes may share the folder
recipe=$(cat pyproject.toml constraints.txt | sha256sum | cut -c1-16)
[ "$(cat "$made" 2>/dev/null)" != "$recipe" ] || exit 0
: >"$made"
"${PYTHON:-python3}" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
  fail "expected Python 3.10 or newer, got $("${PYTHON:-python3}" --version 2>&1); set PYTHON"
"${PYTHON:-python3}" -m venv --clear "$VENV"
"$VENV/bin/python" -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[fast,wandb]"
echo "$recipe" >"$made"
