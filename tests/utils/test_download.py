from __future__ import annotations

import pytest
import torch

from dinov2_custom.errors import CheckpointError
from dinov2_custom.utils.download import fetch
from dinov2_custom.utils.weights import read_weights
from tests.hub.served import serve


def test_a_file_is_fetched_once_and_shows_a_bar(tmp_path, capsys):
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "some.pth").write_bytes(bytes(range(256)) * 10_000)
    with serve(tmp_path / "here") as (url, asked):
        for _ in range(2):
            path = fetch(f"{url}/some.pth?version=2", tmp_path / "there" / "new")
    assert asked == ["/some.pth?version=2"]
    assert path == tmp_path / "there" / "new" / "some.pth"
    assert path.read_bytes() == (tmp_path / "here" / "some.pth").read_bytes()
    assert list(path.parent.iterdir()) == [path]
    shown = capsys.readouterr().err
    assert "some.pth: 100%" in shown and "2.56M/2.56M" in shown


def test_a_broken_connection_leaves_nothing(tmp_path):
    with serve(tmp_path, breaks_off=True) as (url, _):
        with pytest.raises(CheckpointError, match="expected 1,000 bytes, got 300|IncompleteRead"):
            fetch(f"{url}/some.pth", tmp_path / "there", progress=False)
    assert list((tmp_path / "there").iterdir()) == []


def test_nobody_answers_or_has_the_file(tmp_path):
    with serve(tmp_path) as (url, _):
        with pytest.raises(CheckpointError, match="404.*give its path instead"):
            fetch(f"{url}/some.pth", tmp_path / "there")
    with pytest.raises(CheckpointError, match="expected to download some.pth"):
        fetch(f"{url}/some.pth", tmp_path / "there")
    assert list((tmp_path / "there").iterdir()) == []


def test_files_of_one_name_from_two_places_are_two(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "cache"))
    for number in (1, 2):
        (tmp_path / str(number)).mkdir()
        torch.save({"number": torch.tensor(number)}, tmp_path / str(number) / "teacher_checkpoint.pth")
    with serve(tmp_path) as (url, _):
        read = [read_weights(f"{url}/{number}/teacher_checkpoint.pth")["number"].item() for number in (1, 2)]
    assert read == [1, 2]
