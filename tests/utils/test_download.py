from __future__ import annotations

import gc
import os
import warnings

import pytest
import torch
from safetensors.torch import save_file

from dinov2_custom.errors import CheckpointError
from dinov2_custom.utils.download import fetch
from dinov2_custom.utils.weights import read_weights
from tests.hub.served import serve


def test_a_file_is_fetched_once_and_shows_a_bar(tmp_path, capsys):
    (tmp_path / "here").mkdir()
    torch.save({"numbers": torch.arange(640_000)}, tmp_path / "here" / "some.pth")
    with serve(tmp_path / "here") as (url, asked):
        for _ in range(2):
            path = fetch(f"{url}/some.pth?version=2", tmp_path / "there" / "new")
    assert asked == ["/some.pth?version=2"]
    assert path == tmp_path / "there" / "new" / "some.pth"
    assert path.read_bytes() == (tmp_path / "here" / "some.pth").read_bytes()
    assert list(path.parent.iterdir()) == [path]
    shown = capsys.readouterr().err
    assert "some.pth: 100%" in shown and "5.12M/5.12M" in shown


@pytest.fixture
def open_sockets():
    """Collect the sockets that urllib leaves open after a malformed response or a redirect, without its warnings."""
    yield
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()


def answer(content, *headers, status="200 OK"):
    return "\r\n".join([f"HTTP/1.1 {status}", *headers, "", ""]).encode() + content


ZIP = b"PK\x03\x04" + bytes(296)


@pytest.mark.usefixtures("open_sockets")
@pytest.mark.parametrize(
    ("sent", "message"),
    [
        (answer(ZIP, "Content-Length: 1000"), "expected 1,000 bytes, got 300"),
        (answer(b"12c\r\n" + ZIP, "Transfer-Encoding: chunked"), "IncompleteRead"),
        (answer(b"what\r\n" + ZIP, "Transfer-Encoding: chunked"), "expected to download some.pth"),
        (answer(ZIP, "Content-Length: many"), "expected to download some.pth"),
        (b"\x00\x01 no answer of this protocol", "BadStatusLine"),
        (b"", "expected to download some.pth"),
        (answer(b"<!doctype html><title>Log in</title>", "Content-Type: text/html"), "an HTML or XML page"),
        (answer(b"", "Content-Length: 0"), "an empty file"),
        (answer(b'{"error": "not authorized"}'), "begins with"),
        (answer(b"version https://git-lfs.github.com/spec/v1\n"), "Git LFS"),
        (answer(b"", "Location: /some.pth", status="302 Found"), "redirect"),
        (answer(b"", "Location: file:///etc/passwd", status="302 Found"), "expected to download some.pth"),
        (answer(b"", "Location: http://[", status="302 Found"), "expected to download some.pth"),
        (answer(b"<html>", status="503 Service Unavailable"), "503"),
    ],
)
def test_a_cut_or_garbled_answer_is_one_sentence_and_leaves_nothing(tmp_path, sent, message):
    with serve(tmp_path, answer=sent) as (url, _):
        with pytest.raises(CheckpointError, match=message) as e:
            fetch(f"{url}/some.pth", tmp_path / "there", progress=False)
    assert "\n" not in str(e.value) and f"{url}/some.pth" in str(e.value)
    assert list((tmp_path / "there").iterdir()) == []


@pytest.mark.usefixtures("open_sockets")
@pytest.mark.parametrize("zipped", [True, False])
def test_a_redirect_is_followed_and_every_kind_of_weight_file_kept(tmp_path, zipped):
    (tmp_path / "here").mkdir()
    torch.save({"a": torch.ones(3)}, tmp_path / "here" / "w.pth", _use_new_zipfile_serialization=zipped)
    save_file({"a": torch.ones(3)}, tmp_path / "here" / "w.safetensors")
    with serve(tmp_path / "here") as (url, _):
        for name in ("w.pth", "w.safetensors"):
            moved = answer(b"", f"Location: {url}/{name}", "Content-Length: 0", status="301 Moved Permanently")
            with serve(tmp_path, answer=moved) as (old, _):
                path = fetch(f"{old}/{name}", tmp_path / "there", progress=False)
            assert path.name == name and read_weights(path)["a"].tolist() == [1, 1, 1]


def test_secrets_in_a_url_are_not_shown(tmp_path):
    with serve(tmp_path) as (url, _):
        address = url.replace("://", "://user:password@") + "/some.pth?token=abc"
        with pytest.raises(CheckpointError) as e:
            fetch(address, tmp_path / "there")
    assert not any(secret in str(e.value) for secret in ("password", "abc")) and f"{url}/some.pth" in str(e.value)


@pytest.mark.parametrize("umask", [0o077, 0o027, 0o002])
def test_a_downloaded_file_has_the_users_permissions(tmp_path, umask):
    torch.save({"a": torch.ones(3)}, tmp_path / "some.pth")
    before = os.umask(umask)
    try:
        with serve(tmp_path) as (url, _):
            path = fetch(f"{url}/some.pth", tmp_path / "there", progress=False)
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == 0o666 & ~umask


def test_unreachable_server_or_missing_file(tmp_path):
    with serve(tmp_path) as (url, _):
        with pytest.raises(CheckpointError, match="404.*give its path instead"):
            fetch(f"{url}/some.pth", tmp_path / "there")
    with pytest.raises(CheckpointError, match="expected to download some.pth"):
        fetch(f"{url}/some.pth", tmp_path / "there")
    assert list((tmp_path / "there").iterdir()) == []


def test_a_file_in_place_of_a_folder_of_the_cache_is_one_sentence(tmp_path):
    (tmp_path / "cache").touch()
    with serve(tmp_path) as (url, _):
        with pytest.raises(CheckpointError, match="expected to download some.pth into .*cache/hub"):
            fetch(f"{url}/some.pth", tmp_path / "cache" / "hub")


def test_files_of_one_name_from_two_places_are_two(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "cache"))
    for number in (1, 2):
        (tmp_path / str(number)).mkdir()
        torch.save({"number": torch.tensor(number)}, tmp_path / str(number) / "teacher_checkpoint.pth")
    with serve(tmp_path) as (url, _):
        read = [read_weights(f"{url}/{number}/teacher_checkpoint.pth")["number"].item() for number in (1, 2)]
    assert read == [1, 2]
