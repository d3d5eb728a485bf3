"""Fetching the oracle: atomic, safe against a second process, with a clear error if it is unavailable."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.oracle import OracleUnavailable, fetch


def _install(folder: Path, requirements: Path | None = None, text: str = "new") -> None:
    marker = folder / fetch.MARKER
    marker.parent.mkdir(parents=True)
    marker.write_text(text)


def test_existing_files_are_not_fetched_again(tmp_path, monkeypatch):
    _install(tmp_path / "oracle", text="old")
    monkeypatch.setattr(fetch, "_pip_install", lambda folder, requirements: pytest.fail("fetched again"))
    assert fetch.ensure_oracle(tmp_path / "oracle") == tmp_path / "oracle"


def test_a_torn_folder_is_replaced(tmp_path, monkeypatch):
    (tmp_path / "oracle" / "dinov2").mkdir(parents=True)
    monkeypatch.setattr(fetch, "_pip_install", _install)
    assert (fetch.ensure_oracle(tmp_path / "oracle") / fetch.MARKER).read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["oracle"]


def test_another_process_that_was_faster_wins(tmp_path, monkeypatch):
    def install(folder, requirements):
        _install(folder)
        _install(tmp_path / "oracle", text="other process")

    monkeypatch.setattr(fetch, "_pip_install", install)
    assert (fetch.ensure_oracle(tmp_path / "oracle") / fetch.MARKER).read_text() == "other process"
    assert [path.name for path in tmp_path.iterdir()] == ["oracle"]


def test_failure_gives_the_reason_and_leaves_no_files(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    with pytest.raises(OracleUnavailable, match="could not fetch the oracle"):
        fetch.ensure_oracle(tmp_path / "oracle")
    assert not list(tmp_path.iterdir())
