#!/usr/bin/env bash
# Prepares a session on a GPU machine without a network, and runs it there.
#   tools/gpu_session.sh prepare        here: fetch the packages that the machine may lack; print the command to run there
#   tools/gpu_session.sh run [FLAGS]    there: install them for this run alone, then python -m benchmarks gpu-session FLAGS
# The tree and .cache/gpu_session must travel, 64 MiB at most together. GPU_PYTHON is the machine's Python version.
set -euo pipefail
cd "$(dirname "$0")/.."
FOLDER=${GPU_SESSION_FOLDER:-.cache/gpu_session}
LIMIT_MIB=64
GPU_PYTHON=${GPU_PYTHON:-3.12}
PYTHON=${PYTHON:-python3}
# pytest and what it needs, the tests' own needs, and peers that run on a GPU.
PACKAGES=(
  pytest iniconfig pluggy packaging pygments hypothesis sortedcontainers pytest-xdist execnet
  datasets dill multiprocess
  pytorch-cka==1.1.3 cka-pytorch==1.1.3 flash-kmeans==0.3.1 fast-pytorch-kmeans==0.2.2
)

fail() {
  echo "gpu_session: $*" >&2
  exit 1
}

prepare() {
  local platforms=() name kib
  for name in manylinux_2_28 manylinux_2_27 manylinux_2_17 manylinux2014; do
    platforms+=(--platform "${name}_x86_64")
  done
  # Built aside: a download that fails leaves the folder as it was.
  rm -rf "$FOLDER.new"
  mkdir -p "$FOLDER.new/wheels"
  for name in "${PACKAGES[@]}"; do
    "$PYTHON" -m pip download -q --disable-pip-version-check --no-deps --only-binary=:all: \
      --python-version "$GPU_PYTHON" --implementation cp "${platforms[@]}" -d "$FOLDER.new/wheels" "$name" ||
      echo "gpu_session: $name has no wheel for Python $GPU_PYTHON; what needs it will say so" >&2
  done
  rm -rf "$FOLDER"
  mv "$FOLDER.new" "$FOLDER"
  kib=$({ git ls-files -z --cached --others --exclude-standard | xargs -0 du -ck --apparent-size 2>/dev/null
    du -ck --apparent-size "$FOLDER"; } | awk '$2 == "total" { kib += $1 } END { print kib }')
  ((kib <= LIMIT_MIB * 1024)) || fail "tree and $FOLDER: expected at most $LIMIT_MIB MiB, got $((kib / 1024))"
  echo "gpu_session: $((kib / 1024)) MiB in all. Send the tree with $FOLDER, then run there, from the root:"
  echo "FSD_COMMIT=$(git rev-parse --short HEAD) bash tools/gpu_session.sh run --minutes 9 --output \"\$OUT\""
}

run() {
  site=$(mktemp -d) # not local: the trap outlives the function
  trap 'rm -rf "$site"' EXIT
  if compgen -G "$FOLDER/wheels/*.whl" >/dev/null; then
    "$PYTHON" -m pip install -q --disable-pip-version-check --no-index --no-deps --no-compile --target "$site" \
      "$FOLDER"/wheels/*.whl || fail "pip could not install $FOLDER/wheels"
  fi
  # After the tree's own packages, before those of the machine.
  PYTHONPATH="$PWD:$PWD/kernels:$site${PYTHONPATH:+:$PYTHONPATH}" "$PYTHON" -m benchmarks gpu-session "$@"
}

case "${1:-}" in
prepare) prepare ;;
run)
  shift
  run "$@"
  ;;
*) fail "expected prepare or run, got '${1:-}'" ;;
esac
