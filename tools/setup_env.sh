#!/usr/bin/env bash
# Creates the virtual environment and installs the project into it; says what is missing.
set -euo pipefail
PYTHON=${PYTHON:-python3}
VENV=${VENV:-.venv}

fail() {
  echo "setup: $*" >&2
  exit 1
}

command -v "$PYTHON" >/dev/null || fail "no '$PYTHON' found; install Python 3.10 or newer, or run make PYTHON=/path/to/python3"
"$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
  fail "Python 3.10 or newer is needed; $PYTHON is $("$PYTHON" -V 2>&1). Run make PYTHON=/path/to/python3"
"$PYTHON" -c 'import venv, ensurepip' 2>/dev/null ||
  fail "this Python has no venv module; install it (on Debian: apt-get install python3-venv)"
command -v g++ >/dev/null || fail "no g++ found; DeepSpeed builds its CPU communication with it (on Debian: apt-get install g++)"

log=$(mktemp)
trap 'rm -f "$log"' EXIT
install() {
  "$VENV/bin/python" -m pip install --disable-pip-version-check -q -c constraints.txt "$@" 2>"$log" || {
    tail -n 15 "$log" >&2
    fail "pip could not install: $*. Without a network, or behind a proxy, point pip at a mirror (PIP_INDEX_URL) and run make again"
  }
}

echo "setup: creating $VENV and installing the packages of constraints.txt (some minutes the first time)"
[ -x "$VENV/bin/python" ] || "$PYTHON" -m venv "$VENV"
# A link to another environment's bin, or a folder without pyvenv.cfg, is the Python that it was made from.
"$VENV/bin/python" -c 'import sys; sys.exit(sys.prefix == sys.base_prefix)' ||
  fail "$VENV is no virtual environment: packages would go into the Python behind it; remove it and run make again"
# torch first, at the tested version: a range would let pip choose another build.
install torch==2.13.0
install -e '.[all,dev,bench]'
echo "setup: done"
