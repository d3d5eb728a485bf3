"""The DINO and iBOT terms of one group of views, in two ways that give the same numbers.

:func:`chunked_terms` never holds the logits (``train.lean``); :func:`dense_terms` is the definition, through the public
loss classes. Not in here: KoLeo, which has no head. Source: upstream ``train/ssl_meta_arch.py``; the DINO terms are
averaged over 2 + max(2 L, 1) crop pairs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from dinov2_custom.layers.prototype_loss import PrototypeJob
from dinov2_custom.loss.soft_targets import SoftTargets
from dinov2_custom.train.targets import Features, Targets
from dinov2_custom.train.views import ViewGroup, Views

if TYPE_CHECKING:
    from dinov2_custom.train.ssl_meta_arch import SSLMetaArch

Terms = tuple[Tensor, dict[str, Tensor]]  # (the loss to train on, the terms as upstream reports them)


def num_crop_pairs(num_local_crops: int) -> int:
    return 2 + max(2 * num_local_crops, 1)


def dense_terms(model: SSLMetaArch, features: Features, targets: Targets, group: ViewGroup, views: Views) -> Terms:
    """Return a group's part of the terms from all its logits."""
    total, reported = torch.zeros((), device=model.device), {}
    pairs, share = num_crop_pairs(model.num_local_crops), len(group.global_views) / 2
    cls = [one for one in (features.local_cls, features.global_cls) if one is not None]
    cls_logits, patch_logits = model.run_heads("student", cls if model.do_dino else [], features.patches)
    if model.do_dino and features.local_cls is not None:
        local = model.dino_loss(cls_logits[0].chunk(len(group.local_views)), targets.cls.chunk(2)) / pairs
        reported["dino_local_crops_loss"] = local
        total = total + model.dino_loss_weight * local
    if model.do_dino and features.global_cls is not None:
        start, stop = (edge * views.batch_size for edge in (group.global_views.start, group.global_views.stop))
        of_global = model.dino_loss([cls_logits[-1]], [targets.cls[start:stop]]) * 2 * share / pairs
        reported["dino_global_crops_loss"] = of_global
        total = total + model.dino_loss_weight * of_global
    if patch_logits is not None:
        ibot = share * model.ibot_patch_loss.forward_masked(
            patch_logits,
            targets.patches[views.patch_rows.start : views.patch_rows.stop],
            student_masks_flat=views.masks,
            masks_weight=views.patch_weights,
        )
        reported["ibot_loss"] = ibot / 2
        total = total + model.ibot_loss_weight * ibot
    return total, reported


class _HeadWork(NamedTuple):
    """What one head has to do: features and jobs in the same order, and the reported name and factor of each job."""

    features: list[Tensor]
    jobs: list[PrototypeJob]
    names: list[tuple[str, float]]


def chunked_terms(model: SSLMetaArch, features: Features, targets: Targets, group: ViewGroup, views: Views) -> Terms:
    """Return a group's part of the terms, a chunk of logits at a time."""
    work = {"dino_head": _HeadWork([], [], []), "ibot_head": _HeadWork([], [], [])}
    if model.do_dino:
        _add_class_tokens(work["dino_head"], model, features, targets.cls, group, views.batch_size)
    if features.patches is not None:
        _add_patches(work[model.patch_head], model, features.patches, targets.patches, views)
    total, reported = torch.zeros((), device=model.device), {}
    for name, (parts, jobs, names) in work.items():
        if jobs:
            with model.autocast("student", name):
                loss, losses = model.student[name].cross_entropy(torch.cat(parts), jobs)
            total = total + loss
            reported |= {term: value * factor for (term, factor), value in zip(names, losses, strict=True)}
    return total, reported


def _add_class_tokens(
    work: _HeadWork, model: SSLMetaArch, features: Features, targets: SoftTargets, group: ViewGroup, batch_size: int
) -> None:
    weight = model.dino_loss_weight
    each = weight / (batch_size * num_crop_pairs(model.num_local_crops))
    if features.local_cls is not None:

        def of_both_crops(start: int, stop: int) -> Tensor:
            return targets.rows(start, stop).add_(targets.rows(batch_size + start, batch_size + stop))

        weights = torch.full((batch_size,), each, device=model.device)
        options = {"num_views": len(group.local_views), "mass": 2.0, "temperature": model.dino_loss.student_temp}
        work.features.append(features.local_cls)
        work.jobs.append(PrototypeJob(of_both_crops, batch_size, weights, **options))
        work.names.append(("dino_local_crops_loss", 1 / weight))
    if features.global_cls is not None:
        rows, first = len(features.global_cls), group.global_views.start * batch_size
        weights = torch.full((rows,), each, device=model.device)
        work.features.append(features.global_cls)
        work.jobs.append(PrototypeJob(_from(targets, first), rows, weights, temperature=model.dino_loss.student_temp))
        work.names.append(("dino_global_crops_loss", 1 / weight))


def _add_patches(work: _HeadWork, model: SSLMetaArch, patches: Tensor, targets: SoftTargets, views: Views) -> None:
    weight = model.ibot_loss_weight
    weights = views.patch_weights.float() * (weight / (2 * views.batch_size))
    work.features.append(patches)
    work.jobs.append(
        PrototypeJob(
            _from(targets, views.patch_rows.start),
            len(patches),
            weights,
            temperature=model.ibot_patch_loss.student_temp,
        )
    )
    work.names.append(("ibot_loss", 1 / (2 * weight)))


def _from(targets: SoftTargets, first: int):
    return lambda start, stop: targets.rows(first + start, first + stop)
