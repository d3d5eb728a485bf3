"""KoLeo: push each feature away from its nearest neighbour (Sablayrolles et al. 2019, eq. 3)."""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from dinov2_custom import distributed

# Two identical features are eps * sqrt(D) < 1e-6 apart: their gradient is huge and has no meaningful direction.
_DUPLICATE_DISTANCE = 1e-6


class KoLeoLoss(nn.Module):
    """Minus the mean log distance to the nearest neighbour, computed in float32 whatever the input.

    Args:
        over_all_ranks: look for neighbours among the features of all processes, each of which has the same number. The
            loss and gradient are then those of one process with all features: the loss is the same everywhere,
            and gradients must be averaged over the processes, like those of all other losses.
    """

    def __init__(self, over_all_ranks: bool = False) -> None:
        super().__init__()
        self.over_all_ranks = over_all_ranks

    def pairwise_NNs_inner(self, x: Tensor) -> Tensor:  # noqa: N802 - upstream's name
        """Return :func:`nearest_neighbours` of ``x``."""
        return nearest_neighbours(x)

    def forward(self, student_output: Tensor, eps: float = 1e-8) -> Tensor:
        """Return the loss of features (B, D); 0 for a single one, and without gradient for exact duplicates."""
        with torch.autocast(student_output.device.type, enabled=False):
            features = F.normalize(student_output.float(), p=2.0, dim=-1, eps=eps)
            if self.over_all_ranks and distributed.is_enabled():
                return _spread_of_all_ranks(features, eps)
            return _spread(features, eps)


def _spread(features: Tensor, eps: float) -> Tensor:
    """Return the loss of normalised features (B, D)."""
    if len(features) < 2:
        return features.sum() * 0.0
    neighbours = features[nearest_neighbours(features.detach())]
    distances = F.pairwise_distance(features, neighbours, p=2.0, eps=eps)
    distances = torch.where(distances < _DUPLICATE_DISTANCE, distances.detach(), distances)
    return -torch.log(distances + eps).mean()


def _spread_of_all_ranks(features: Tensor, eps: float) -> Tensor:
    """Return the loss of all ranks' features.

    Every rank computes the gradient for all of them and keeps its own rows' part, including its contribution as
    others' neighbour. So the backward pass has no reduction that could interleave with those of the parameters'
    gradients.
    """
    rank, size, rows = dist.get_rank(), dist.get_world_size(), len(features)
    gathered = [torch.empty_like(features) for _ in range(size)]
    dist.all_gather(gathered, features.detach().contiguous())
    with torch.enable_grad():
        everything = torch.cat(gathered).requires_grad_()
        loss = _spread(everything, eps)
        (gradient,) = torch.autograd.grad(loss, everything)
    return _WithGradient.apply(features, loss.detach(), size * gradient[rank * rows : (rank + 1) * rows])


class _WithGradient(torch.autograd.Function):
    """A value whose gradient with respect to ``features`` is precomputed."""

    @staticmethod
    def forward(ctx, features: Tensor, value: Tensor, gradient: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        return value.clone()

    @staticmethod
    def backward(ctx, outer: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return outer * gradient, None, None


def nearest_neighbours(features: Tensor) -> Tensor:
    """Return for each row of normalised (B, D) the index of the other row with the largest dot product."""
    similarity = features @ features.T
    similarity.fill_diagonal_(-2.0)  # below -1, the smallest cosine, even after rounding
    return similarity.argmax(dim=1)
