"""The k nearest neighbours of features, as classifiers, for the command, the quickstart and evaluation during training.

Training may import this module, ``eval.utils`` and ``eval.datasets``, but nothing else of ``eval``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinov2_custom import distributed
from dinov2_custom.eval.datasets import find_same_files
from dinov2_custom.eval.utils import extract_features

NEIGHBOURS, TEMPERATURE = 20, 0.07  # of :func:`knn_accuracy`
_QUERIES_A_STEP = 256
_ALIKE = 0.01  # mean squared distance from the mean below which cosines, with rounding errors of 1e-7, lose their order


class KnnModule(nn.Module):
    """Score classes by the votes of the nearest training features.

    ``nb_knn`` is limited to the number of training features.

    Args:
        train_features: (N, D), rows of length 1.
        train_labels: (N,) in 0..num_classes-1.
        nb_knn: numbers of neighbours to score with.
        T: temperature of the softmax over the max(nb_knn) similarities that weights the votes.
        device: device of the computation; None for that of ``train_features``.

    Features of an untrained network with a small LayerScale are so alike that their float32 cosines all round to 1. In
    that case the mean is subtracted and distances are compared instead, which gives the same order and weights.

    Source: Wu et al. 2018 (instance discrimination), section 3.4; upstream ``eval/knn.py``.
    """

    def __init__(
        self,
        train_features: Tensor,
        train_labels: Tensor,
        nb_knn: Sequence[int],
        T: float,
        device: str | torch.device | None = None,
        num_classes: int = 1000,
    ) -> None:
        super().__init__()
        self.train_features, self.train_labels = train_features.to(device), train_labels.to(device)
        self.nb_knn, self.T, self.num_classes = list(nb_knn), T, num_classes
        number = len(self.train_features)
        # a product, since mean(dim=0) allocates partial sums on CUDA: 2.6 MB for 5 MB of features
        mean = self.train_features.new_full((number,), 1 / number) @ self.train_features
        self.mean, self.half_squares = None, None
        length = torch.linalg.vector_norm(self.train_features) / number**0.5  # 1, unless a caller has not normalised
        if float(1 - (mean / length).square().sum()) < _ALIKE:
            self.mean, self.train_features = mean, self.train_features - mean
            self.half_squares = self.train_features.square().sum(dim=1) / 2

    def _similarity(self, features: Tensor) -> Tensor:
        """Return cosines (B, N); if the mean is subtracted, cosines minus a constant per row."""
        features = features.to(self.train_features.device)
        if self.mean is None:
            return features @ self.train_features.T
        return (features - self.mean) @ self.train_features.T - self.half_squares

    def forward(self, features_rank: Tensor, exclude: Tensor | None = None) -> dict[int, Tensor]:
        """Return ``{k: class scores (B, C)}``, rows summing to at most 1, for ``features_rank`` (B, D) of length 1.

        Args:
            exclude: (B,) index of a training feature excluded from each row's votes; -1 for none.
        """
        similarity = self._similarity(features_rank)
        available = len(self.train_features)
        if exclude is not None:
            exclude = exclude.to(similarity.device)
            own = similarity.gather(1, exclude.clamp(min=0)[:, None])
            own = own.masked_fill(exclude[:, None] >= 0, float("-inf"))
            similarity.scatter_(1, exclude.clamp(min=0)[:, None], own)
            available -= 1
        nearest, indices = similarity.topk(min(max(self.nb_knn), available), dim=1)
        if self.mean is not None:
            nearest = nearest.double()  # float32 would lose the order of two classes with equal votes
        weights = F.softmax(nearest / self.T, dim=1)
        labels = self.train_labels[indices]
        scores = {k: weights.new_zeros(len(features_rank), self.num_classes) for k in self.nb_knn}
        for k, votes in scores.items():
            votes.scatter_add_(1, labels[:, :k], weights[:, :k])
        return scores


def knn_accuracy(
    model: nn.Module, train_dataset, val_dataset, batch_size: int, num_workers: int, k: int = NEIGHBOURS
) -> float:
    """Return the top-1 accuracy of classifying the images of one labelled dataset by their neighbours in another.

    Several processes share the images, and each gets the same result. An image is not its own neighbour.

    Args:
        model: maps images to features of length 1; its mode is not changed.
        batch_size: images per forward pass and process.
    """
    same = torch.from_numpy(find_same_files(train_dataset, val_dataset))
    features, labels = extract_features(model, train_dataset, batch_size, num_workers)
    queries, truths = extract_features(model, val_dataset, batch_size, num_workers)
    num_classes = int(max(labels.max(), truths.max())) + 1
    module = KnnModule(features, labels, [k], TEMPERATURE, num_classes=num_classes)
    exclude = same.to(features.device) if bool((same >= 0).any()) else None
    own = torch.arange(distributed.get_global_rank(), len(queries), distributed.get_global_size())
    hits = torch.zeros((), dtype=torch.long, device=features.device)
    for rows in own.to(features.device).split(_QUERIES_A_STEP):
        (scores,) = module(queries[rows], exclude=None if exclude is None else exclude[rows]).values()
        hits += (scores.argmax(dim=1) == truths[rows]).sum()
    return int(distributed.all_reduce(hits)) / len(queries)
