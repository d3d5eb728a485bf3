"""Evaluate by logistic regression: python run/eval/log_regression.py, with the arguments of knn.py"""
import sys

try:
    from dinov2_custom.cli import main
except ModuleNotFoundError:
    sys.exit(f"error: no dinov2_custom in {sys.executable}: activate another or `pip install -c constraints.txt -e .`")
if __name__ == "__main__":
    main("log_regression")
