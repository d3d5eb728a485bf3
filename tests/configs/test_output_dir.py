import datetime
import os
from pathlib import Path

import pytest

from dinov2_custom.configs.output_dir import check_output_dir, resolve_output_dir
from dinov2_custom.errors import ConfigError

NOW = datetime.datetime(2025, 1, 2, 3, 4, 5)


def test_argument_wins_over_configuration():
    assert resolve_output_dir("/a", "/b") == "/a"
    assert resolve_output_dir("", "/b") == resolve_output_dir(None, "/b") == "/b"


def test_default_is_dated_below_the_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert resolve_output_dir(None, "", NOW) == f"{tmp_path}/outputs/2025-01-02_03-04-05"
    assert os.listdir(tmp_path) == []
    for taken, free in (("05", "05_2"), ("05_2", "05_3")):
        os.makedirs(f"outputs/2025-01-02_03-04-{taken}")
        assert resolve_output_dir(None, "", NOW) == f"{tmp_path}/outputs/2025-01-02_03-04-{free}"


def test_paths_are_absolute_and_home_is_expanded(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/someone")
    assert resolve_output_dir("out", None) == f"{tmp_path}/out"
    assert resolve_output_dir("~/out", None) == "/home/someone/out"
    assert resolve_output_dir(".", None) == str(tmp_path)


def test_a_directory_that_can_be_made_is_fine_and_nothing_is_left(tmp_path):
    check_output_dir(str(tmp_path))
    check_output_dir(str(tmp_path / "a" / "b"))
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("inside", ["", "sub", "sub/sub"])
def test_a_file_in_the_way(tmp_path, inside):
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(ConfigError, match=f"got {file}, which is a file -> choose another with --output-dir"):
        check_output_dir(str(file / inside))


def test_a_dangling_link_in_the_way(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="which is no folder"):
        check_output_dir(str(tmp_path / "link" / "out"))


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs Linux's /proc, where even root cannot make folders")
def test_a_place_where_nothing_can_be_made():
    with pytest.raises(ConfigError, match="writable place.* in /proc"):
        check_output_dir("/proc/out")
