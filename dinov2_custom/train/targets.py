"""What passes between the stages of a step, the teacher's targets and the student's features, and how targets are made.

Not in here: the networks (``ssl_meta_arch``), the formulas (``loss``). Read :class:`Targets` first.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from dinov2_custom.loss.sinkhorn import sinkhorn_targets
from dinov2_custom.loss.soft_targets import SoftTargets, TeacherLogits

if TYPE_CHECKING:
    from dinov2_custom.train.ssl_meta_arch import SSLMetaArch

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


def teacher_assignments(
    model: SSLMetaArch, cls: Tensor | None, patches: Tensor | None, images: dict, teacher_temp: float
) -> Targets:
    """Turn the teacher's features of class tokens and masked patches into targets by the configured centering.

    Where ``train.lean``, some rows at a time when they are wanted.
    """
    rows = {"real_rows": (images["masks_weight"] > 0).float()} if model.constant_shapes else {}
    if model.lean_heads:
        return _late_assignments(model, cls, patches, teacher_temp, rows)
    cls_logits, patch_logits = model.run_heads("teacher", [] if cls is None else [cls], patches)
    of_cls = None if cls is None else _assign(model, model.dino_loss, cls_logits[0], teacher_temp)
    if patch_logits is None:
        return Targets(of_cls, None)
    if model.cfg.train.centering == "sinkhorn_knopp":
        rows["n_masked_patches_tensor"] = images["n_masked_patches"]
    return Targets(of_cls, _assign(model, model.ibot_patch_loss, patch_logits, teacher_temp, **rows))


def _assign(model: SSLMetaArch, loss: nn.Module, logits: Tensor, teacher_temp: float, **rows: Tensor) -> Tensor:
    """``rows``: what is known of rows of patches."""
    if model.cfg.train.centering == "sinkhorn_knopp":
        return loss.sinkhorn_knopp_teacher(logits, teacher_temp, **rows)
    targets = loss.softmax_center_teacher(logits, teacher_temp=teacher_temp)
    loss.update_center(logits, **rows)
    targets = targets.view_as(logits)  # the centre of patches has one dimension more
    return targets * rows["real_rows"][:, None] if rows else targets


def _late_assignments(
    model: SSLMetaArch, cls: Tensor | None, patches: Tensor | None, teacher_temp: float, rows: dict[str, Tensor]
) -> Targets:
    """Do that without all logits being there at once."""

    def assign(loss: nn.Module, factors: tuple[Tensor, Tensor] | None, keep: bool, **rows: Tensor):
        if factors is None:
            return None
        if model.cfg.train.centering == "sinkhorn_knopp":
            return sinkhorn_targets(TeacherLogits.of_factors(*factors, keep=True), teacher_temp, **rows)
        return loss.late_targets(*factors, teacher_temp, keep=keep, **rows)

    of_cls, of_patches = _factors(model, cls, patches)
    return Targets(  # a class token's are wanted by several groups of views, a patch's once
        assign(model.dino_loss, of_cls, keep=True), assign(model.ibot_patch_loss, of_patches, keep=False, **rows)
    )


def _factors(model: SSLMetaArch, cls: Tensor | None, patches: Tensor | None) -> list[tuple[Tensor, Tensor] | None]:
    """Return the teacher's bottleneck features and prototypes for class tokens and for patches, as far as there are
    such; one pass where they share the head."""
    shared = cls is not None and patches is not None and not model.ibot_separate_head
    parts = [("dino_head", torch.cat((cls, patches)))] if shared else [("dino_head", cls), (model.patch_head, patches)]
    factors: list[tuple[Tensor, Tensor] | None] = []
    for head, rows in parts:
        with model.autocast("teacher", head):
            factors.append(None if rows is None else model.teacher[head].factors(rows))
    if not shared:
        return factors
    features, weight = factors[0]
    return [(part, weight) for part in features.split((len(cls), len(patches)))]


def assignment_entropies(targets: Targets) -> dict[str, Tensor]:
    """Return, in nats, how undecided the teacher is: ``teacher_entropy`` the mean entropy of a row, and
    ``prototype_entropy`` that of the mean row. Both at ln K: uniform collapse. The second near 0: one prototype won.
    """
    assignments = targets.cls if targets.cls is not None else targets.patches
    chunks = [assignments] if isinstance(assignments, Tensor) else assignments.chunks()
    of_rows, mean = torch.zeros(()), torch.zeros(())
    for probabilities in chunks:
        of_rows = of_rows - torch.xlogy(probabilities, probabilities).sum()
        mean = mean + probabilities.sum(dim=0)
    num_rows = mean.sum().round().clamp_min(1)  # each row sums to 1, padding to 0
    mean = mean / num_rows
    # not torch.special.entr, which on a GPU is compiled when it is first used
    return {"teacher_entropy": of_rows / num_rows, "prototype_entropy": -torch.xlogy(mean, mean).sum()}
