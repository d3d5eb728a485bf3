"""Train: python run/train/train.py --config-file configs/vits.yaml --output-dir out train.dataset_path=/my/images

On this machine, or as a SLURM job with flags such as --partition: docs/slurm.md."""

import sys

try:
    from dinov2_custom import entry
except ModuleNotFoundError:
    sys.exit(f"error: no dinov2_custom in {sys.executable}: activate another or `pip install -c constraints.txt -e .`")
from dinov2_custom.run.train.train import main

if __name__ == "__main__":
    entry.leave(entry.reported(main))
