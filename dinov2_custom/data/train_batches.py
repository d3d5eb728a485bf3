"""From an iteration to the uint8 arrays of its batch, and from those to what the model takes.

:class:`TrainBatches` is what a data-loading process runs, a pure function of (seed, draw numbers);
:func:`unpack` is the main process's part. Not in here: processes (``pool``). Read :meth:`TrainBatches.build` first.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch

from .collate import describe_masks
from .finish import NUM_PARAMETERS, Finisher, pack_draw
from .pixels import change_colours_into, cut_crops
from .samples import BadRecord, TrainSample, TrainSamples
from .slots import Field
from .step_masks import Masks, Step, masks_of_draws


class Report(NamedTuple):
    """What a built batch has beside its arrays. complete: False when there is a draw without any readable image."""

    complete: bool
    upperbound: int
    bad: list[BadRecord]


class TrainBatches:
    """Build any batch: the i-th of the whole job has the draws ``first_draw`` + [i*b*W, (i+1)*b*W), of which rank r
    takes the r-th block of b = ``batch_size``; ``accumulation_steps`` of them make one step, and masks are spread over
    a step. ``late_colours``: leave the colours to the device."""

    def __init__(
        self,
        samples: TrainSamples,
        masks: Masks,
        *,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        accumulation_steps: int = 1,
        first_draw: int = 0,
        late_colours: bool = False,
    ):
        self.samples = samples
        self.masks = masks
        self.batch_size = batch_size
        self.rank = rank
        self.world_size = world_size
        self.accumulation_steps = accumulation_steps
        self.first_draw = first_draw
        self.late_colours = late_colours
        self._resized: list[np.ndarray] = []

    @property
    def fields(self) -> dict[str, Field]:
        """The arrays of a batch, crop-major. Crops are (crops, b, 3, S, S), with late colours (crops, b, S, S, 3)."""
        augment, b = self.samples.augment, self.batch_size
        fields = {"masks": Field((2 * b, self.masks.n_tokens), np.bool_)}
        for kind, number, size in (
            ("global", 2, augment.global_crops_size),
            ("local", augment.local_crops_number, augment.local_crops_size),
        ):
            shape = (size, size, 3) if self.late_colours else (3, size, size)
            fields[f"{kind}_crops"] = Field((number, b, *shape))
            if self.late_colours:
                fields[f"{kind}_colours"] = Field((number, b, NUM_PARAMETERS), np.float32)
        return fields

    def draws(self, iteration: int) -> range:
        """Return this rank's draws of batch ``iteration``."""
        first = self.first_draw + (iteration * self.world_size + self.rank) * self.batch_size
        return range(first, first + self.batch_size)

    def step(self, iteration: int) -> Step:
        """Return the draws of all ranks of the step that batch ``iteration`` belongs to."""
        size = self.accumulation_steps * self.world_size * self.batch_size
        return Step(self.first_draw + iteration // self.accumulation_steps * size, size)

    def name(self, index: int) -> str:
        """Return the path of image ``index``."""
        return self.samples.dataset.name(index)

    def give_up(self, index: int, reason: str) -> None:
        """Count image ``index`` as one that cannot be read."""
        self.samples.give_up(index, reason)

    def build(
        self, iteration: int, arrays: dict[str, np.ndarray], note: Callable[[int], Any] = lambda index: None
    ) -> Report:
        """Fill ``arrays`` (of :attr:`fields`) with batch ``iteration``; ``note``: see ``TrainSamples.find``."""
        draws = self.draws(iteration)
        bad: list[BadRecord] = []
        complete = True
        for position, draw in enumerate(draws):
            sample = self.samples.find(draw, note)
            bad += sample.bad
            if sample.pixels is None:
                complete = False
            elif complete:
                self._cut(sample, arrays, position)
        step = self.step(iteration)
        arrays["masks"][...], upperbound = masks_of_draws(self.masks, self.samples.seed, step, draws)
        return Report(complete, upperbound, bad)

    def _cut(self, sample: TrainSample, arrays: dict[str, np.ndarray], position: int) -> None:
        crops = (arrays["global_crops"][:, position], arrays["local_crops"][:, position])
        outs = [out for kind in crops for out in kind]
        if self.late_colours:
            cut_crops(outs, sample.pixels, sample.crops)
            rows = (arrays["global_colours"][:, position], arrays["local_colours"][:, position])
            for row, crop in zip((row for kind in rows for row in kind), sample.crops, strict=True):
                pack_draw(crop, row)
            return
        if not self._resized:
            self._resized = [np.empty((size, size, 3), np.uint8) for size in self.samples.augment.sizes]
        cut_crops(self._resized, sample.pixels, sample.crops)
        for out, crop, draw in zip(outs, self._resized, sample.crops, strict=True):
            change_colours_into(out, crop, draw)


def unpack(
    arrays: dict[str, np.ndarray], upperbound: int, finish: Finisher, device: torch.device | str
) -> dict[str, Any]:
    """Return the batch that ``arrays`` hold under upstream's names: crops finished on ``device``, masks on the CPU.

    Nothing of it looks at ``arrays`` any more, once the device has done what it was asked to.
    """
    crops = {
        f"collated_{kind}_crops": finish(
            torch.from_numpy(arrays[f"{kind}_crops"]).flatten(0, 1),
            device,
            arrays[f"{kind}_colours"].reshape(-1, NUM_PARAMETERS) if f"{kind}_colours" in arrays else None,
        )
        for kind in ("global", "local")
    }
    if not len(crops["collated_local_crops"]):
        crops["collated_local_crops"] = crops["collated_global_crops"][:0]
    return {**crops, **describe_masks(torch.from_numpy(arrays["masks"].copy()), upperbound)}
