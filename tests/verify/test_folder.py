import subprocess
import sys

import pytest

from dinov2_custom.errors import ConfigError
from dinov2_custom.verify.folder import default_folder, own_folder


def test_a_new_folder_is_made_and_entered_again(tmp_path):
    for _ in range(2):
        with own_folder(tmp_path / "a" / "b", "mark") as folder:
            assert (folder / "mark").exists()


def test_foreign_folder_is_rejected_and_unchanged(tmp_path):
    (tmp_path / "thesis.txt").write_text("x")
    with pytest.raises(ConfigError, match="thesis.txt; nothing was changed"), own_folder(tmp_path, "mark"):
        pass
    assert not (tmp_path / "mark").exists()


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="expected a folder to write to"), own_folder(tmp_path / "file", "mark"):
        pass


@pytest.mark.skipif(sys.platform != "linux", reason="locks by fcntl")
def test_one_process_at_a_time(tmp_path):
    code = f"from dinov2_custom.verify.folder import own_folder\nwith own_folder({str(tmp_path)!r}, 'mark'): pass"
    with own_folder(tmp_path, "mark"):
        second = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "expected a folder that no other process uses" in second.stderr
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_default_folder_is_the_same_for_the_same_dataset(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cells").mkdir()
    name = default_folder("verify", ["cells"])
    assert name.startswith("outputs/verify_cells_")
    assert name == default_folder("verify", [str(tmp_path / "cells")])
    assert name != default_folder("verify", ["cells", "other"])
    assert default_folder("verify", ["ImageNet:split=TRAIN:root=/a/b:"]).startswith("outputs/verify_b_")
