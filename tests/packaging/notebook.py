"""Execute notebooks/quickstart.ipynb on generated images, with two steps. Needs the extra [ci]."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path

import nbformat
import numpy as np
from nbclient import NotebookClient
from PIL import Image

NOTEBOOK = Path(__file__).resolve().parents[2] / "notebooks" / "quickstart.ipynb"


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        (images := Path(folder, "images")).mkdir()
        for seed in range(8):
            pixels = np.random.default_rng(seed).integers(0, 255, (64, 64, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(images / f"{seed}.png")
        overrides = {"train.max_steps": 2, "train.batch_size_per_gpu": 4, "train.num_workers": 0, "train.log_every": 1}
        overrides["evaluation.online.every"] = 0
        os.environ |= {"DINOV2_IMAGES": str(images), "DINOV2_OUT": f"{folder}/out"}
        os.environ |= {"DINOV2_OVERRIDES": json.dumps(overrides)}
        notebook = nbformat.read(NOTEBOOK, as_version=4)
        NotebookClient(notebook, timeout=600, resources={"metadata": {"path": folder}}).execute()
        shown = [output for cell in notebook.cells for output in cell.get("outputs", []) if "data" in output]
        pictures = ["image/png" in output["data"] for output in shown].count(True)
        assert pictures == 1, f"expected the curves once, got {pictures} pictures"
        print("notebook: trained two steps and drew the curves")


if __name__ == "__main__":
    main()
