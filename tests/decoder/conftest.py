from __future__ import annotations

import pytest

from dinov2_custom.decoder.settings import read_settings

TINY = ["width=32", "groups=2", "queries=8", "decoder_layers=1", "epochs=2", "batch=4", "num_workers=0", "lr=1e-3"]


def pytest_collection_modifyitems(items):
    """Skip what needs transformers with RF-DETR, and pycocotools, where they are missing."""
    try:
        import accelerate  # noqa: F401
        import pycocotools  # noqa: F401
        import scipy  # noqa: F401
        from transformers import RfDetrForObjectDetection  # noqa: F401
    except ImportError:
        for item in items:
            is_of_settings = item.path.name == "test_settings.py" and "settings" in item.name
            if "tests/decoder/" in item.path.as_posix() and not is_of_settings:
                item.add_marker(pytest.mark.skip(reason="needs transformers>=5.24, accelerate, pycocotools and scipy"))


@pytest.fixture
def tiny():
    """Return settings of a tiny decoder, with overrides."""
    return lambda *overrides: read_settings([*TINY, *overrides])
