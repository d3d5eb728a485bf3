"""Builders for the tests of the ring: batches of numbers with failures at chosen images, importable when spawned."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import numpy as np

from dinov2_custom.data.pool import Field
from dinov2_custom.errors import DataError

IMAGES = 3


class Numbers:
    """Iteration i holds images 3i, 3i+1, 3i+2; ``accident(self, image)`` may end the process."""

    fields = {"values": Field((IMAGES,), np.int64), "square": Field((IMAGES, 5), np.float32)}

    def __init__(self, folder: Path | None = None):
        self.folder = folder
        self.lost: dict[int, str] = {}

    def name(self, index: int) -> str:
        return f"image-{index}.jpg"

    def give_up(self, index: int, reason: str) -> None:
        self.lost[index] = reason

    def accident(self, image: int) -> None:
        pass

    def build(self, iteration, arrays, note):
        for i in range(IMAGES):
            image = IMAGES * iteration + i
            note(image)
            if image not in self.lost:
                self.accident(image)
            arrays["values"][i] = image
            arrays["square"][i] = -1 if image in self.lost else image**2
        return [self.lost[n] for n in range(IMAGES * iteration, IMAGES * iteration + IMAGES) if n in self.lost]

    def first_time(self, image: int) -> bool:
        """Return whether this is the first process that reaches ``image``."""
        try:
            (self.folder / f"{image}").touch(exist_ok=False)
        except FileExistsError:
            return False
        return True


class KilledOnce(Numbers):
    """Image 7 kills the process once, as the out-of-memory killer would."""

    def accident(self, image):
        if image == 7 and self.first_time(image):
            os.kill(os.getpid(), signal.SIGKILL)


class Deadly(Numbers):
    """Images 7 and 20 always end the process."""

    def accident(self, image):
        if image in (7, 20):
            os._exit(3)


class Starving(Numbers):
    """Every image kills the first process that reaches it."""

    def accident(self, image):
        if self.first_time(image):
            os.kill(os.getpid(), signal.SIGKILL)


class Mistaken(Numbers):
    """Iteration 2 raises an exception."""

    def accident(self, image):
        if image == 7:
            raise DataError("a mistake at image 7")


class Unpicklable(Numbers):
    def accident(self, image):
        class Local(Exception):
            pass

        raise Local("cannot travel")


class Hanging(Numbers):
    """Image 7 never finishes."""

    def accident(self, image):
        if image == 7:
            time.sleep(3600)


class Slow(Numbers):
    def accident(self, image):
        time.sleep(0.05)
