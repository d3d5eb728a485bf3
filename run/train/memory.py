"""Does it fit on my GPU? No GPU is needed: python run/train/memory.py --config-file configs/vitl.yaml --fits 40"""
import sys

try:
    from dinov2_custom.cli import main
except ModuleNotFoundError:
    sys.exit(f"error: no dinov2_custom in {sys.executable}: activate another or `pip install -c constraints.txt -e .`")
if __name__ == "__main__":
    main("memory")
