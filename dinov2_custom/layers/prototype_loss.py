"""Cross-entropy against prototypes without a full (rows x prototypes) tensor.

The logits of a chunk are computed, their loss and gradient taken, and then freed; saved for the backward pass are the
gradients of the bottleneck features and of the prototypes, which a scalar loss only scales.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dinov2_custom.layers.weight_norm import normalised, normalised_backward_, row_chunks

# Logits of a chunk, for memory: 16 Mi are 256 rows of 65,536 prototypes. On CPUs, the fewest that give fast products.
_CHUNK_LOGITS = {"cuda": 2**24, "cpu": 2**22}
# Gradients of logits that are multiplied with their features at once: each product adds to a (K, D) tensor in float32,
# which on a CPU takes longer than the product of a small chunk. Elsewhere a chunk at a time.
_PRODUCT_LOGITS = {"cpu": 2**24}
_ACCUMULATE = torch.float32  # logits, losses and gradients, for any dtype of the products
_FP16_LARGEST_FACTOR = 64.0


@dataclass(frozen=True)
class PrototypeJob:
    """One cross-entropy among those that share a head's prototypes.

    Attributes:
        targets: (start, stop) -> probabilities (stop - start, K) in float32.
        num_rows: n, rows of targets.
        weights: (n,) float32, by which the rows' losses are summed.
        num_views: J, rows of features per row of targets; features have the layout (J, n).
        mass: the sum of a row of targets.
        temperature: of the student's softmax.
    """

    targets: Callable[[int, int], Tensor]
    num_rows: int
    weights: Tensor
    num_views: int = 1
    mass: float = 1.0
    temperature: float = 0.1


def chunk_size(num_prototypes: int, device: torch.device) -> int:
    """Return the number of rows of logits per chunk."""
    return max(1, _CHUNK_LOGITS.get(device.type, 2**24) // num_prototypes)


def prototype_cross_entropy(
    features: Tensor,
    weight_v: Tensor,
    weight_g: Tensor,
    jobs: Sequence[PrototypeJob],
    chunk_loss: Callable | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the sum of the jobs' losses, and the losses of the jobs (num_jobs,) without gradient.

    Args:
        features: (R, D) normalised bottleneck features, the jobs' rows concatenated; products use their precision.
        weight_v, weight_g: (K, D) and (K, 1) of the weight-normalised prototypes.
        chunk_loss: :func:`chunk_cross_entropy`, or a replacement for it.
    """
    return _PrototypeCrossEntropy.apply(features, weight_v, weight_g, list(jobs), chunk_loss or chunk_cross_entropy)


class _PrototypeCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, features, weight_v, weight_g, jobs, chunk_loss):
        weight = normalised(weight_v, weight_g, features.dtype)
        needs = ctx.needs_input_grad
        of_features = torch.zeros(features.shape, dtype=_ACCUMULATE, device=features.device) if needs[0] else None
        of_weight = _WeightGradient(weight) if needs[1] else None
        losses = [
            _run_job(job, rows, weight, of_rows, of_weight, chunk_loss)
            for job, rows, of_rows in zip(jobs, _split(features, jobs), _split(of_features, jobs), strict=True)
        ]
        of_v, of_g = (None, None) if of_weight is None else normalised_backward_(of_weight.sum(), weight_v, weight_g)
        ctx.save_for_backward(of_features, of_v, of_g)
        ctx.features_dtype = features.dtype
        losses = torch.stack(losses) if losses else features.new_zeros(0, dtype=_ACCUMULATE)
        ctx.mark_non_differentiable(losses)
        return losses.sum(), losses

    @staticmethod
    def backward(ctx, gradient, _):
        of_features, of_v, of_g = (None if one is None else one * gradient for one in ctx.saved_tensors)
        return None if of_features is None else of_features.to(ctx.features_dtype), of_v, of_g, None, None


def _split(rows: Tensor | None, jobs: Sequence[PrototypeJob]) -> Sequence[Tensor | None]:
    """Cut (R, D) into one (J, n, D) view per job."""
    if rows is None:
        return [None] * len(jobs)
    parts = rows.split([job.num_views * job.num_rows for job in jobs])
    return [part.unflatten(0, (job.num_views, job.num_rows)) for part, job in zip(parts, jobs, strict=True)]


def _run_job(job, rows_JnD, weight, of_rows_JnD, of_weight, chunk_loss) -> Tensor:
    """Return a job's loss, write its gradient to ``of_rows_JnD`` and add that of the prototypes, if needed."""
    loss = weight.new_zeros((), dtype=_ACCUMULATE)
    at_a_time = chunk_size(len(weight), weight.device) // job.num_views
    for rows in row_chunks(job.num_rows, at_a_time):
        features = rows_JnD[:, rows].flatten(0, 1)
        logits = (features @ weight.T).unflatten(0, (job.num_views, -1))
        targets = job.targets(rows.start, rows.stop)
        losses, gradient = chunk_loss(logits, targets, 1.0 / job.temperature, job.mass)
        loss += (losses.sum(dim=0) * job.weights[rows]).sum()
        gradient = gradient.flatten(0, 1)
        factor = (job.weights[rows] / job.temperature).repeat(job.num_views)[:, None]
        if of_rows_JnD is not None:
            of_rows_JnD[:, rows] = ((gradient @ weight).to(_ACCUMULATE) * factor).unflatten(0, (job.num_views, -1))
        if of_weight is not None:
            of_weight.add(gradient, features, factor)
        del logits, targets, losses, gradient  # free before the next chunk's are allocated
    return loss


class _WeightGradient:
    """The gradient of the (K, D) ``weight``: the sum over chunks of rows of gradient^T (factor * features)."""

    def __init__(self, weight: Tensor) -> None:
        self._weight = weight
        self._sum: Tensor | None = None
        self._chunks: list[tuple[Tensor, Tensor]] = []

    def add(self, gradient: Tensor, features: Tensor, factor: Tensor) -> None:
        """Add a chunk: (r, K) gradients of logits, (r, D) features, (r, 1) factors in float32."""
        weighted = features.to(_ACCUMULATE) * factor
        if gradient.dtype == torch.float16:  # the products are far below float16's smallest number
            gain = _FP16_LARGEST_FACTOR / factor.amax().clamp_min(1e-30)  # 0 if all rows are padding
            self._add((gradient.T @ (weighted * gain).to(features.dtype)).to(_ACCUMULATE).div_(gain))
            return
        self._chunks.append((gradient, weighted.to(features.dtype)))
        if sum(chunk.numel() for chunk, _ in self._chunks) >= _PRODUCT_LOGITS.get(gradient.device.type, 0):
            self._multiply()

    def sum(self) -> Tensor:
        """Return the sum, (K, D) in float32; zeros without chunks."""
        self._multiply()
        return self._weight.new_zeros(self._weight.shape, dtype=_ACCUMULATE) if self._sum is None else self._sum

    def _multiply(self) -> None:
        if self._chunks:
            parts = zip(*self._chunks, strict=True)
            gradients, features = (part[0] if len(part) == 1 else torch.cat(part) for part in parts)
            self._chunks.clear()
            self._add(gradients.T @ features)

    def _add(self, product: Tensor) -> None:
        self._sum = product.to(_ACCUMULATE) if self._sum is None else self._sum.add_(product)


def chunk_cross_entropy(logits_JnK: Tensor, targets_nK: Tensor, inverse_temp: float, mass: float):
    """Return the losses (J, n) of a chunk, and d loss / d (logits * inverse_temp) in the logits' precision.

    -sum t log p has the gradient mass * p - t.
    """
    log_p = F.log_softmax(logits_JnK.to(_ACCUMULATE) * inverse_temp, dim=-1)
    losses = -(targets_nK * log_p).sum(dim=-1)
    gradient = log_p.exp_().mul_(mass).sub_(targets_nK)
    return losses, gradient.to(logits_JnK.dtype)


def fused_cross_entropy(logits_JnK: Tensor, targets_nK: Tensor, inverse_temp: float, mass: float):
    """Return :func:`chunk_cross_entropy`'s results in three passes over the chunk, if compiled.

    The largest logit is subtracted before scaling: for a softmax of scaled logits, torch 2.15's inductor needs several
    more passes.
    """
    logits = logits_JnK.to(_ACCUMULATE)
    below = (logits - logits.amax(dim=-1, keepdim=True)) * inverse_temp
    log_sum = below.exp().sum(dim=-1, keepdim=True).log()
    losses = log_sum[..., 0] * targets_nK.sum(dim=-1) - (targets_nK * below).sum(dim=-1)
    gradient = (below - log_sum).exp() * mass - targets_nK
    return losses, gradient.to(logits_JnK.dtype)
