"""The one sentence for a package that is not installed."""

import re
import sys
from pathlib import Path

import pytest

from dinov2_custom.errors import ConfigError, DataError
from dinov2_custom.extras import OF_EXTRA, install, missing, optional

PROJECT = Path(__file__).resolve().parents[1] / "pyproject.toml"


@pytest.mark.skipif(sys.version_info < (3, 11), reason="tomllib came with Python 3.11; CI runs this there")
def test_every_extra_brings_its_package():
    import tomllib

    extras = tomllib.loads(PROJECT.read_text())["project"]["optional-dependencies"]
    for package, extra in OF_EXTRA.values():
        assert package in [re.split(r"[<>=]", one)[0] for one in extras[extra]]


def test_what_is_there_is_returned():
    assert optional("matplotlib.figure", "figures").__name__ == "matplotlib.figure"


def test_what_is_not_there_is_one_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(ConfigError) as caught:
        optional("sklearn", "--solver sklearn", otherwise="--solver torch")
    assert re.fullmatch(
        r"--solver sklearn: expected the package scikit-learn, got none \(.*sklearn.*\); "
        r"pip install 'dinov2_custom\[eval\]', or --solver torch",
        str(caught.value),
    )
    for name in ("pyarrow", "pyarrow.ipc"):  # which other tests import
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(DataError, match="Parquet: expected the package pyarrow"):
        optional("pyarrow.ipc", "Parquet", DataError)
    assert missing("wandb", "wandb.mode") == f"wandb.mode: expected the package wandb, got none; {install('wandb')}"
