"""Set up logging: rank 0 to stdout and ``<output>/logs/log.txt``, every other rank only to ``log.txt.rank<r>``.

A line is ``I20260131 18:00:00 4242 dinov2 train.py:100] message``; the first letter is one of D, I, W, E, F (fatal).
"""

from __future__ import annotations

import logging
import os
import sys
from contextlib import suppress
from pathlib import Path

from dinov2_custom import distributed
from dinov2_custom.errors import ConfigError
from dinov2_custom.logging import progress

_FORMAT = "%(letter)s%(asctime)s %(process)s %(name)s %(filename)s:%(lineno)s] %(message)s"
_DATE_FORMAT = "%Y%m%d %H:%M:%S"
_WARNINGS = "py.warnings"  # the logger used by logging.captureWarnings
_OURS = ("dinov2", "dinov2_custom", "__main__")


def setup_logging(
    output: str | os.PathLike | None = None,
    *,
    name: str | None = None,
    level: int = logging.DEBUG,
    capture_warnings: bool = True,
    hold: bool = False,
) -> None:
    """Send the records of logger ``name`` to the console and a file, replacing the handlers of an earlier call.

    Call it after ``distributed.enable()``, which sets the rank. Records below INFO of other libraries are dropped.

    Args:
        output: run directory, or the log file itself if it ends in ``.txt`` or ``.log``; None writes no file.
        name: name of a logger, whose propagation is disabled (warnings are treated likewise); None for the root logger,
            which receives all records.
        level: minimum level.
        capture_warnings: also log warnings.
        hold: create no file or folder before :func:`open_log`, which then writes the records held so far.

    Raises:
        ConfigError: if the file cannot be written.
    """
    logger = logging.getLogger(name)
    handlers: list[logging.Handler] = []
    if output:
        handlers.append(file := _LogFileHandler(log_path(Path(output))))
        if not hold:
            file.open_file()
    if distributed.is_main_process():
        handlers.append(_ConsoleHandler(sys.stdout))
    remove_logging(name)
    logger.setLevel(level)
    logger.propagate = name is None
    for handler in handlers:
        handler.setLevel(level)
        handler.setFormatter(_Formatter(_FORMAT, _DATE_FORMAT))
        handler.addFilter(_is_wanted)
        logger.addHandler(handler)
        if name is not None and capture_warnings:
            logging.getLogger(_WARNINGS).addHandler(handler)
    logging.captureWarnings(capture_warnings)


def open_log(name: str | None = None) -> None:
    """Open the file of logger ``name`` and write the records held so far (``hold`` of :func:`setup_logging`).

    Has no effect if there is nothing to open.
    """
    for handler in logging.getLogger(name).handlers:
        if isinstance(handler, _LogFileHandler):
            handler.open_file()


def remove_logging(name: str | None = None) -> None:
    """Remove and close the handlers that :func:`setup_logging` added to logger ``name``."""
    logger, warnings = logging.getLogger(name), logging.getLogger(_WARNINGS)
    for handler in list(logger.handlers):
        if isinstance(handler, (_ConsoleHandler, _LogFileHandler)):
            logger.removeHandler(handler)
            warnings.removeHandler(handler)
            handler.close()
    logger.propagate = True
    logging.captureWarnings(False)


def log_path(output: Path) -> Path:
    """Return the log file of this process, given a run directory or the main process's log file."""
    path = output if output.suffix in (".txt", ".log") else output / "logs" / "log.txt"
    rank = distributed.get_global_rank()
    return path if rank == 0 else path.with_name(f"{path.name}.rank{rank}")


def _is_wanted(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.INFO or record.name.split(".")[0] in _OURS


class _Formatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        record.letter = "F" if record.levelno >= logging.CRITICAL else record.levelname[:1]
        return super().format(record)


class _LogFileHandler(logging.FileHandler):
    """A log file. A write error is reported once, without a traceback.

    Records are held in memory until :meth:`open_file`.
    """

    said = False

    def __init__(self, path: Path) -> None:
        super().__init__(path, encoding="utf-8", delay=True, errors="backslashreplace")  # names of files are any bytes
        self._held: list[logging.LogRecord] | None = []

    def open_file(self) -> None:
        """Create the file and its folder on the first call, and write the records held so far.

        Raises:
            ConfigError: if it cannot be written.
        """
        if self._held is None:
            return
        try:
            Path(self.baseFilename).parent.mkdir(parents=True, exist_ok=True)
            self.stream = self._open()
        except OSError as e:
            raise ConfigError(
                f"output directory: expected one that can be written, got {e.strerror or e} at {self.baseFilename}. "
                "Give another with --output-dir."
            ) from e
        held, self._held = self._held, None
        for record in held:
            self.emit(record)

    def emit(self, record: logging.LogRecord) -> None:
        if self._held is None:
            super().emit(record)
        else:
            self._held.append(record)

    def close(self) -> None:
        with suppress(OSError):  # buffered lines that could not be written
            super().close()

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 (the name is logging's)
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            super().handleError(record)
        elif not self.said:
            self.said = True
            trouble = error.strerror or error
            print(f"warning: {self.baseFilename}: cannot write the log, {trouble}; lines are lost", file=sys.stderr)


class _ConsoleHandler(logging.StreamHandler):
    """Print lines without corrupting an open progress bar, and omit what the bar shows already.

    Records with ``extra={"file_only": True}`` are written only to the log file.
    """

    def emit(self, record: logging.LogRecord) -> None:
        if getattr(record, "file_only", False):
            return
        if getattr(record, "shown_by_bar", False) and progress.bar_is_open() and self.stream.isatty():
            return
        with progress.bar_set_aside(self.stream):
            super().emit(record)
