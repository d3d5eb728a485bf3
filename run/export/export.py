"""Write a trained backbone for another library: python run/export/export.py out --to hf|timm|torch|onnx|..."""
import sys

try:
    from dinov2_custom.cli import main
except ModuleNotFoundError:
    sys.exit(f"error: no dinov2_custom in {sys.executable}: activate another or `pip install -c constraints.txt -e .`")
if __name__ == "__main__":
    main("export")
