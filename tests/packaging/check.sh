#!/usr/bin/env bash
# Build the source distribution and the wheel, check their metadata, train two steps from the wheel in another environment, and
# check the Dockerfile without docker; execute the notebook. Needs the extra [ci] in the environment of the interpreter given: check.sh PYTHON
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
left_out=$(comm -23 <(cd "$source" && find . -type f | cut -c3- | sort) <(tar tzf "$scratch"/dist/*.tar.gz | cut -d/ -f2- | sort))
test "$left_out" = .gitignore || { echo "the source distribution lacks: $left_out"; exit 1; }

environment "$scratch/wheel"
"$scratch/wheel/bin/python" -m pip install --quiet --no-deps "$scratch"/dist/*.whl
mkdir -p "$scratch/elsewhere/images" && cd "$scratch/elsewhere"
wheel=$scratch/wheel/bin/python
"$wheel" - "$scratch/wheel" <<'PY'
import sys
from pathlib import Path

import dinov2_custom
import numpy as np
from PIL import Image

assert dinov2_custom.__file__.startswith(sys.argv[1]), dinov2_custom.__file__
for seed in range(8):
    pixels = np.random.default_rng(seed).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    for folder in ("images", f"labelled/{seed % 2}"):
        Path(folder).mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(f"{folder}/{seed}.png")
PY
logged() { # what follows the name of a log file: a command whose output is shown only if it fails
  "${@:2}" >"$scratch/$1.log" 2>&1 || { cat "$scratch/$1.log"; exit 1; }
}
logged train "$scratch/wheel/bin/dinov2-custom" train --config-file small.yaml --output-dir out \
  train.dataset_path=images train.max_steps=2 train.batch_size_per_gpu=4 train.num_workers=0 evaluation.online.every=0
test -f out/eval/training_1/teacher_checkpoint.pth
# the command that the log ends with, and the one that an unknown key is answered with
next=$(sed -n 's/.*next: \(dinov2-custom knn --pretrained-weights [^ ]*\) .*/\1/p' "$scratch/train.log")
test -n "$next"
labelled=LabelledFolder:root=labelled
PATH=$scratch/wheel/bin:$PATH logged knn bash -c "$next --train-dataset $labelled --val-dataset $labelled --nb_knn 1 \
  --num-workers 0 --output-dir knn"
test -f knn/results_eval_knn.json
"$wheel" -m dinov2_custom --help >/dev/null
"$wheel" -m dinov2_custom.configs.document | grep -q '^# Configuration'
echo "wheel: trained two steps with its own recipe, and evaluated"

cd "$repository"
PATH=$(dirname "$python"):$PATH hadolint Dockerfile
environment "$scratch/image"
PATH=$scratch/image/bin:$PATH "$python" tests/packaging/dockerfile.py Dockerfile "$source" "$scratch/context"
"$python" tests/packaging/notebook.py
