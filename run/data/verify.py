"""Check every image, list the bad and the clean ones: python run/data/verify.py /my/images --output-dir verified"""
import sys

try:
    from dinov2_custom.cli import main
except ModuleNotFoundError:
    sys.exit(f"error: no dinov2_custom in {sys.executable}: activate another or `pip install -c constraints.txt -e .`")
if __name__ == "__main__":
    main("verify")
