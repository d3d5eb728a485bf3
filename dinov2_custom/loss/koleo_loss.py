"""KoLeo: push each feature away from its nearest neighbour (Sablayrolles et al. 2019, eq. 3)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Two identical features lie eps * sqrt(D) < 1e-6 apart and have no direction to be pushed in, only a huge gradient.
_DUPLICATE_DISTANCE = 1e-6


class KoLeoLoss(nn.Module):
    """Minus the mean log distance to the nearest neighbour, computed in float32 whatever the input."""

    def pairwise_NNs_inner(self, x: Tensor) -> Tensor:  # noqa: N802 - upstream's name
        """Return :func:`nearest_neighbours` of ``x``."""
        return nearest_neighbours(x)

    def forward(self, student_output: Tensor, eps: float = 1e-8) -> Tensor:
        """Return the loss of features (B, D); 0 when B < 2, and without gradient for exact duplicates."""
        if len(student_output) < 2:
            return student_output.float().sum() * 0.0
        with torch.autocast(student_output.device.type, enabled=False):
            features = F.normalize(student_output.float(), p=2.0, dim=-1, eps=eps)
            neighbours = features[nearest_neighbours(features.detach())]
            distances = F.pairwise_distance(features, neighbours, p=2.0, eps=eps)
            distances = torch.where(distances < _DUPLICATE_DISTANCE, distances.detach(), distances)
            return -torch.log(distances + eps).mean()


def nearest_neighbours(features: Tensor) -> Tensor:
    """Return for each row of normalised (B, D) the index of the other row with the largest dot product."""
    similarity = features @ features.T
    similarity.fill_diagonal_(-1.0)
    return similarity.argmax(dim=1)
