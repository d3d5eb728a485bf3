"""Destinations and format of log lines."""

import io
import logging
import os
import re
import warnings

import pytest

from dinov2_custom import distributed
from dinov2_custom.errors import ConfigError
from dinov2_custom.logging import ProgressBar, open_log, remove_logging, setup_logging

LINE = re.compile(r"[DIWEF]\d{8} \d\d:\d\d:\d\d \d+ \S+ \S+:\d+\] ")


@pytest.fixture(autouse=True)
def root_as_before():
    logger = logging.getLogger()
    level = logger.level
    yield
    remove_logging()
    remove_logging("dinov2")
    logger.setLevel(level)
    logging.getLogger("dinov2").setLevel(logging.NOTSET)


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_rank_0_writes_to_stdout_and_file(tmp_path, capsys):
    setup_logging(tmp_path)
    logging.getLogger("dinov2").info("hello")
    shown, written = capsys.readouterr().out, (tmp_path / "logs" / "log.txt").read_text()
    assert shown == written
    assert re.fullmatch(LINE.pattern + "hello\n", written)
    assert " dinov2 test_setup.py:" in written


def test_other_ranks_write_to_their_file_only(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(distributed, "get_global_rank", lambda: 3)
    setup_logging(tmp_path)
    logging.getLogger("dinov2").info("hello")
    assert capsys.readouterr().out == ""
    assert [file.name for file in (tmp_path / "logs").iterdir()] == ["log.txt.rank3"]


def test_letters(tmp_path):
    setup_logging(tmp_path)
    for level in (logging.DEBUG, logging.INFO, logging.WARNING, logging.ERROR, logging.CRITICAL):
        logging.getLogger("dinov2").log(level, "x")
    lines = (tmp_path / "logs" / "log.txt").read_text().splitlines()
    assert "".join(line[0] for line in lines) == "DIWEF"


def test_second_setup_replaces_the_first(tmp_path, capsys):
    foreign = logging.NullHandler()
    logging.getLogger().addHandler(foreign)
    before = list(logging.getLogger().handlers)
    try:
        setup_logging(tmp_path / "a")
        setup_logging(tmp_path / "b.log", level=logging.WARNING)
        logging.getLogger("dinov2").info("too low")
        logging.getLogger("dinov2").warning("hello")
        assert (tmp_path / "a" / "logs" / "log.txt").read_text() == ""
        assert (tmp_path / "b.log").read_text().count("\n") == 1
        assert capsys.readouterr().out.count("hello") == 1
        remove_logging()
        assert logging.getLogger().handlers == before
    finally:
        logging.getLogger().removeHandler(foreign)


def test_lines_held_back_are_in_the_file_once_it_is_opened(tmp_path, capsys):
    setup_logging(tmp_path / "out", name="dinov2", hold=True)
    logging.getLogger("dinov2").info("first")
    assert not (tmp_path / "out").exists() and "first" in capsys.readouterr().out
    open_log("dinov2")
    logging.getLogger("dinov2").info("second")
    open_log("dinov2")
    lines = (tmp_path / "out" / "logs" / "log.txt").read_text().splitlines()
    assert [line.split()[-1] for line in lines] == ["first", "second"]
    setup_logging(tmp_path / "never", name="dinov2", hold=True)
    logging.getLogger("dinov2").info("third")
    remove_logging("dinov2")
    assert not (tmp_path / "never").exists()


def test_appends_to_an_existing_file(tmp_path):
    for text in ("first", "second"):
        setup_logging(tmp_path)
        logging.getLogger("dinov2").info(text)
    assert [line.split()[-1] for line in (tmp_path / "logs" / "log.txt").read_text().splitlines()] == [
        "first",
        "second",
    ]


def test_debug_records_of_other_libraries_are_left_out(tmp_path, capsys):
    setup_logging()
    logging.getLogger("PIL.PngImagePlugin").debug("noise")
    logging.getLogger("PIL").warning("worth knowing")
    logging.getLogger("dinov2_custom.data").debug("ours")
    out = capsys.readouterr().out
    assert "noise" not in out and "worth knowing" in out and "ours" in out


def test_named_logger_keeps_its_records_to_itself(tmp_path, capsys):
    setup_logging(tmp_path / "all.txt")
    setup_logging(tmp_path / "own.txt", name="dinov2")
    logging.getLogger("dinov2").info("hello")
    assert capsys.readouterr().out.count("hello") == 1
    assert (tmp_path / "all.txt").read_text() == ""


@pytest.mark.parametrize("name", [None, "dinov2"])
def test_warnings_become_records(tmp_path, name):
    setup_logging(tmp_path, name=name)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        logging.captureWarnings(False)  # catch_warnings has put Python's own function in place
        logging.captureWarnings(True)
        warnings.warn("mind the gap", stacklevel=1)
    logging.captureWarnings(False)
    line = (tmp_path / "logs" / "log.txt").read_text().splitlines()[0]
    assert line.startswith("W") and "mind the gap" in line


def test_names_of_files_may_be_any_bytes(tmp_path, capsys):
    setup_logging(tmp_path, name="dinov2")
    logging.getLogger("dinov2").warning("bad image: \udce9.png")
    remove_logging("dinov2")
    assert r"bad image: \udce9.png" in (tmp_path / "logs" / "log.txt").read_text(encoding="utf-8")


def test_unwritable_folder_is_reported(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="output directory: expected one that can be written.*--output-dir"):
        setup_logging(tmp_path / "file")


def test_log_lines_and_bar_share_a_terminal(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr("sys.stdout", terminal)
    monkeypatch.setattr("sys.stderr", terminal)
    setup_logging()
    with ProgressBar(10, description="Training") as bar:
        assert bar.visible
        bar.update(4)
        logging.getLogger("dinov2").info("beside the bar")
        logging.getLogger("dinov2").info("in the bar already", extra={"shown_by_bar": True})
    logging.getLogger("dinov2").info("after it", extra={"shown_by_bar": True})
    drawn = terminal.getvalue()
    assert "in the bar already" not in drawn and "after it" in drawn
    lines = [line.split("\r")[-1] for line in drawn.split("\n")]  # what remains visible of each line
    assert sum(bool(LINE.match(line)) for line in lines) == 2
    assert re.search(r"Training:.*4/10", drawn)


def test_log_write_error_is_reported_once_without_a_traceback(tmp_path, capsys):
    if not os.path.exists("/dev/full"):
        pytest.skip("NO FULL FILE: /dev/full is Linux's")
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "log.txt").symlink_to("/dev/full")
    setup_logging(output=str(tmp_path), name="dinov2")
    for _ in range(3):
        logging.getLogger("dinov2").warning("a line")
    said = capsys.readouterr()
    assert said.err.count("cannot write the log, No space left on device; lines are lost") == 1
    assert "Traceback" not in said.err and (said.out + said.err).count("a line") == 3
    remove_logging("dinov2")
