#!/usr/bin/env bash
# What a node does before it trains: the Python environment, then the data. Safe to run again at any time: what is complete is
# left alone. Variables: DATA DATA_DIR, VENV (default ~/dinov2-venv), PYTHON (default python3).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
fail() { echo "error: $*" >&2; exit 1; }
[ -n "${DATA:-}" ] && [ -n "${DATA_DIR:-}" ] || fail "expected DATA and DATA_DIR, got an empty one; pass it with --env"
VENV=${VENV:-$HOME/dinov2-venv}

# the environment is made again when its recipe has changed
ready=$VENV/.ready-$(cat pyproject.toml constraints.txt | sha256sum | cut -c1-16)
if [ ! -e "$ready" ]; then
  "${PYTHON:-python3}" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
    fail "expected Python 3.10 or newer, got $("${PYTHON:-python3}" --version 2>&1); set PYTHON"
  "${PYTHON:-python3}" -m venv --clear "$VENV"
  "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[fast,wandb]"
  touch "$ready"
fi

case $DATA in
  /* | ./* | "~"*) ;;   # on this machine already
  *)
    if ! command -v rclone >/dev/null; then
      root=$([ "$(id -u)" = 0 ] || echo sudo)
      { $root apt-get update -qq && $root env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq rclone; } >/dev/null ||
        fail "expected the command rclone, and could not install it with apt-get; install it on the image"
    fi ;;
esac
"$VENV/bin/python" sky/stage.py "$DATA" "$DATA_DIR"
