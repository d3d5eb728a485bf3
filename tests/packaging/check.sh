#!/usr/bin/env bash
# Build the source distribution and the wheel, check their metadata, train two steps from the wheel in another environment, and
# check the Dockerfile without docker. Needs the extra [ci] in the environment of the interpreter given: check.sh PYTHON
#
# The other environments take torch and the requirements from that interpreter's, through a .pth file, instead of downloading
# them again. A plain path in such a file adds packages, but not the editable installation of this checkout.
set -euo pipefail
python=$(realpath -s "$1")
cd "$(dirname "$0")/../.."
repository=$PWD
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
export PIP_DISABLE_PIP_VERSION_CHECK=1 OMP_NUM_THREADS=1

environment() { # folder: a virtual environment with the requirements and without the package
  "$python" -m venv "$1"
  "$python" -c 'import sys; print("\n".join(p for p in sys.path if p.endswith("site-packages")))' \
    >"$("$1/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/requirements.pth"
}

source=$scratch/source # the files of the repository alone, whatever else is in this folder
mkdir "$source"
git ls-files -z --cached --others --exclude-standard | while IFS= read -r -d '' file; do
  if [ -e "$file" ]; then cp --parents -a "$file" "$source"; fi
done

"$python" -m build --outdir "$scratch/dist" "$source" >"$scratch/build.log" 2>&1 || { cat "$scratch/build.log"; exit 1; }
"$python" -m twine check --strict "$scratch"/dist/*

environment "$scratch/wheel"
"$scratch/wheel/bin/python" -m pip install --quiet --no-deps "$scratch"/dist/*.whl
mkdir -p "$scratch/elsewhere/images" && cd "$scratch/elsewhere"
"$scratch/wheel/bin/python" - "$scratch/wheel" <<'PY'
import sys

import dinov2_custom
import numpy as np
from PIL import Image

assert dinov2_custom.__file__.startswith(sys.argv[1]), dinov2_custom.__file__
for seed in range(8):
    pixels = np.random.default_rng(seed).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(f"images/{seed}.png")
PY
"$scratch/wheel/bin/python" -m dinov2_custom --help >/dev/null
"$scratch/wheel/bin/python" -m dinov2_custom train --config-file "$repository/configs/small.yaml" --output-dir out \
  train.dataset_path=images train.max_steps=2 train.batch_size_per_gpu=4 train.num_workers=0 >"$scratch/train.log" 2>&1 ||
  { cat "$scratch/train.log"; exit 1; }
test -f out/eval/training_1/teacher_checkpoint.pth
echo "wheel: trained two steps"

cd "$repository"
PATH=$(dirname "$python"):$PATH hadolint Dockerfile
environment "$scratch/image"
PATH=$scratch/image/bin:$PATH "$python" tests/packaging/dockerfile.py Dockerfile "$source" "$scratch/context"
