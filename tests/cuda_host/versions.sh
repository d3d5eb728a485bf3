#!/usr/bin/env bash
# Run tests/cuda_host under CUDA builds of torch, given as pip's requirements: tests/cuda_host/versions.sh torch torch==2.11.0
#
# Each gets a virtual environment of its own, .venv-cuda-*: 5 to 6 GB, two to three minutes. What cannot be had here (no
# network, no wheel for this system, no compiler) is left out, in one line that begins with SKIPPED.
set -euo pipefail
cd "$(dirname "$0")/../.."
limit_minutes=10

install() { # requirement, folder
  "${PYTHON:-python3}" -m venv --clear "$2"
  grep -v '^torch==' constraints.txt >"$2/constraints.txt"
  # cuda-toolkit[crt] adds the compiler's headers to those of the runtime, which torch brings: no /usr/local/cuda is needed
  timeout "${limit_minutes}m" "$2/bin/python" -m pip install --quiet --disable-pip-version-check \
    -c "$2/constraints.txt" "$1" 'cuda-toolkit[crt]' -e '.[eval,fast]' pytest pytest-xdist &&
    touch "$2/.ready"
}

failed=0
for requirement in "$@"; do
  folder=.venv-cuda-${requirement#torch==}
  if ! command -v g++ >/dev/null; then
    echo "SKIPPED: tests/cuda_host with $requirement: no g++ here to build the stand-in of the CUDA runtime" >&2
  elif ! [ -e "$folder/.ready" ] && ! install "$requirement" "$folder"; then
    rm -rf "$folder"
    echo "SKIPPED: tests/cuda_host with $requirement: not installed within $limit_minutes minutes, see above" >&2
  else
    echo "tests/cuda_host with $("$folder/bin/python" -c 'import torch; print("torch", torch.__version__)')"
    OMP_NUM_THREADS=1 "$folder/bin/python" -m pytest -n 2 --durations 10 tests/cuda_host || failed=1
  fi
done
exit $failed
