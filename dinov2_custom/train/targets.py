"""What passes between the stages of a step: the teacher's targets and the student's features, by name.

Not in here: how they are computed (``ssl_meta_arch``). Read :class:`Targets` first.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from dinov2_custom.loss.soft_targets import SoftTargets

LOSS_NAMES = ("dino_local_crops_loss", "dino_global_crops_loss", "koleo_loss", "ibot_loss")


class Targets(NamedTuple):
    """Teacher probabilities: ``cls`` (2b, K), the second crop's rows first; ``patches`` (M, K'). None: not trained."""

    cls: Tensor | SoftTargets | None
    patches: Tensor | SoftTargets | None


class Features(NamedTuple):
    """A group's student features ``local_cls`` (L*b, D), ``global_cls`` (G*b, D) and ``patches`` (M, D), the masked
    ones; None: not in the group, or not trained."""

    local_cls: Tensor | None
    global_cls: Tensor | None
    patches: Tensor | None


def assignment_entropies(targets: Targets) -> dict[str, Tensor]:
    """Return, in nats, how undecided the teacher is: ``teacher_entropy`` the mean entropy of a row, and
    ``prototype_entropy`` that of the mean row. Both at ln K: uniform collapse. The second near 0: one prototype won.
    """
    assignments = targets.cls if targets.cls is not None else targets.patches
    chunks = [assignments] if isinstance(assignments, Tensor) else assignments.chunks()
    of_rows, mean = torch.zeros(()), torch.zeros(())
    for probabilities in chunks:
        of_rows = of_rows + torch.special.entr(probabilities).sum()
        mean = mean + probabilities.sum(dim=0)
    num_rows = mean.sum().round().clamp_min(1)  # each row sums to 1, padding to 0
    return {
        "teacher_entropy": of_rows / num_rows,
        "prototype_entropy": torch.special.entr(mean / num_rows).sum(),
    }
