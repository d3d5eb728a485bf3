"""Train: python run/train/train.py --config-file configs/vits.yaml --output-dir out train.dataset_path=/my/images"""
import sys

try:
    from dinov2_custom.cli import main
except ModuleNotFoundError:
    sys.exit(f"error: no dinov2_custom in {sys.executable}: activate another or `pip install -c constraints.txt -e .`")
if __name__ == "__main__":
    main("train")
