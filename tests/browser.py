"""Show a page in a real browser."""

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.processes import CEILING_S

needs_browser = pytest.mark.skipif(
    not shutil.which("chromium"), reason="needs chromium: the Debian package of this name"
)


def count_pixels(page: Path, colours: list[str], tmp_path: Path) -> list[int]:
    """Return how many pixels of a screenshot of ``page`` have each of the colours ("#0072B2")."""
    picture = tmp_path / "page.png"
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
    options += [f"--user-data-dir={tmp_path / 'user'}", "--window-size=1500,2000", f"--screenshot={picture}"]
    subprocess.run(["chromium", *options, page.as_uri()], check=True, capture_output=True, timeout=CEILING_S)
    with Image.open(picture) as image:
        pixels = np.asarray(image.convert("RGB")).reshape(-1, 3)
    return [int((pixels == [int(c[i : i + 2], 16) for i in (1, 3, 5)]).all(axis=1).sum()) for c in colours]
