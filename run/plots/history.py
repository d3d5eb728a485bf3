"""Draw the metrics of runs: python run/plots/history.py out [another/run ...] [--output-dir DIR]"""
import sys

try:
    from dinov2_custom.cli import main
except ModuleNotFoundError:
    sys.exit(f"error: no dinov2_custom in {sys.executable}: activate another or `pip install -c constraints.txt -e .`")
if __name__ == "__main__":
    main("history")
