"""What passes between the stages of a step: the teacher's targets and the student's outputs, by name.

Not in here: how they are computed (``ssl_meta_arch``). Read :class:`Targets` first.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

LOSS_NAMES = ("dino_local_crops_loss", "dino_global_crops_loss", "koleo_loss", "ibot_loss")


class Targets(NamedTuple):
    """Teacher probabilities: ``cls`` (2b, K), the second crop's rows first; ``patches`` (M, K'). None: not trained."""

    cls: Tensor | None
    patches: Tensor | None


class Outputs(NamedTuple):
    """A group's student logits ``local_cls`` (L*b, K), ``global_cls`` (G*b, K), ``patches`` (M, K'), and ``features``
    (G*b, D) of the global crops; None: not trained or not in the group."""

    local_cls: Tensor | None
    global_cls: Tensor | None
    patches: Tensor | None
    features: Tensor | None


def assignment_entropies(targets: Targets) -> dict[str, Tensor]:
    """Return, in nats, how undecided the teacher is: ``teacher_entropy`` the mean entropy of a row, and
    ``prototype_entropy`` that of the mean row. Both at ln K: uniform collapse. The second near 0: one prototype won.
    """
    probabilities = targets.cls if targets.cls is not None else targets.patches
    mean = probabilities.mean(dim=0)
    return {
        "teacher_entropy": torch.special.entr(probabilities).sum(dim=-1).mean(),
        "prototype_entropy": torch.special.entr(mean).sum(),
    }
