"""What ended a process, said where a person looks: one line for what they can mend, a traceback in the main log else.

Not here: processes that end without an exception, or not at all (``watch.py``). Read :func:`translate` first.
"""

from __future__ import annotations

import logging
import os
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from torch.distributed.elastic.multiprocessing.errors import ErrorHandler

from dinov2_custom import distributed
from dinov2_custom.errors import DINOv2Error, LostProcessError, ResourceError, reason_of

logger = logging.getLogger("dinov2")
_NO_MEMORY = ("can't allocate memory", "not enough memory", "out of memory", "Cannot allocate memory")
_LOST = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Connection refused", "Socket Timeout")
_LOST += ("ncclRemoteError",)


def append_to_main_log(run: Path, text: str) -> None:
    """Write a line to the run's log from any process, in one piece; it is on the disk when this returns."""
    line = f"E{time.strftime('%Y%m%d %H:%M:%S')} {os.getpid()} dinov2 rank {distributed.get_global_rank()}] {text}\n"
    path = Path(run) / "logs" / "log.txt"
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "ab", buffering=0) as file:
        file.write(line.encode())
        with suppress(OSError):  # a file system that cannot
            os.fsync(file)


@contextmanager
def reported(cfg, run: Path, lost: Callable[[Path], str | None]) -> Iterator[None]:
    """Say what ends the body, once however these are nested, and raise what :func:`translate` makes of it."""
    try:
        yield
    except Exception as e:
        if getattr(e, "is_reported", False):
            raise
        told = translate(e, cfg, run, lost)
        told.is_reported = True
        if told is e:
            raise
        raise told from e


def translate(
    error: Exception, cfg, run: Path, lost: Callable[[Path], str | None], patience_s: float = 10.0
) -> Exception:
    """Log ``error`` and return what to raise in its place, itself where there is nothing better.

    Out of memory becomes a ResourceError, a broken connection to another process a LostProcessError that names it. A
    traceback goes to this process's log, and to the main one.

    Args:
        lost: says who is gone, "" if nobody is yet, None if it cannot know; asked for up to ``patience_s``.
    """
    refused = isinstance(error, DINOv2Error)  # before it began, nothing is left of it: see run_directory
    if is_out_of_memory(error):
        error = ResourceError(describe_memory(cfg, error))
    if distributed.is_enabled() and not isinstance(error, DINOv2Error) and any(text in str(error) for text in _LOST):
        deadline = time.monotonic() + patience_s
        while (who := lost(run)) == "" and time.monotonic() < deadline:
            time.sleep(0.2)
        unknown = "to a process on another machine" if who == "" else "to another process"
        error = LostProcessError(
            f"expected all {distributed.get_global_size()} processes, got a broken connection: "
            f"{who or unknown} ({reason_of(error)}); the same command goes on from the newest "
            "checkpoint"
        )
    if isinstance(error, DINOv2Error):
        logger.error(str(error), extra={"file_only": True})  # the caller tells the user
        text = str(error)
    else:
        text = "".join(traceback.format_exception(error)).rstrip()
        if os.environ.get("TORCHELASTIC_ERROR_FILE"):  # torchrun shows it at its end
            ErrorHandler().record_exception(error)
        logger.error(text, extra={"file_only": True})
    if not distributed.is_main_process() and not (refused and not (Path(run) / "logs").exists()):
        append_to_main_log(run, text)
    return error


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether a device or the machine had no more memory to give."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _NO_MEMORY)


def describe_memory(cfg, error: BaseException) -> str:
    """Return the one sentence that says how much was asked for and what to change."""
    batch, crops, locals_ = cfg.train.batch_size_per_gpu, cfg.crops, cfg.crops.local_crops_number
    images = batch * (2 + locals_)
    sentences = str(error).partition("\n")[0].split(". ")
    known = [one for one in sentences if "allocate" in one or "capacity" in one]  # how much of how much
    known = known or [one for one in sentences if "memory" in one]
    reason = (". ".join(known) or type(error).__name__)[:200]
    sizes = f"2 of {crops.global_crops_size} px and {locals_} of {crops.local_crops_size} px each"
    return (
        f"memory: expected room for a batch of {batch} images a process = {images} crops ({sizes}) through "
        f"{cfg.student.arch}, got none ({reason}); lower train.batch_size_per_gpu to {max(1, batch // 2)} with "
        f"optim.accumulation_steps={2 * cfg.optim.accumulation_steps} for the same step, raise train.view_groups, or "
        "take smaller crops"
    )
