"""The k nearest neighbours of features, as classifiers, for the command, the quickstart and evaluation during training.

Training may import this module, ``eval.utils`` and ``eval.datasets``, but nothing else of ``eval``.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import islice

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinov2_custom import distributed
from dinov2_custom.data.image_batches import Batch, ImageBatches, batches, of_list, repeated
from dinov2_custom.errors import DataError, shortage
from dinov2_custom.eval.datasets import Joined, find_same_files, num_classes_of
from dinov2_custom.eval.utils import extract_features_with_dataloader, share_of
from dinov2_custom.utils.transfer import to_device, to_host

NEIGHBOURS, TEMPERATURE = 20, 0.07  # of :class:`KnnAccuracy`
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
        if float(to_host(1 - (mean / length).square().sum()).wait()) < _ALIKE:
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


class KnnAccuracy:
    """Top-1 accuracy of classifying the images of one labelled dataset by their neighbours in another.

    May be called repeatedly: when a call ends, the processes read the first images of the next call, so that it does
    not begin by waiting for them. Each keeps up to ``pool.TASKS_A_WORKER`` batches in memory. Several processes of a
    job share the images, and each gets the same result. An image is not its own neighbour. Images that cannot be read
    are left out; each call tries to read them again.

    Args:
        batch_size: images per forward pass and process.
        num_workers: processes that read images; 0: in this process.

    Attributes:
        num_scored: number of images classified by the last call.
        bad: index -> reason of the images that the last call could not read, the same in all processes; the images of
            ``val_dataset`` follow those of ``train_dataset``, unless they are the same.

    Raises:
        DataError: no image can be read.
    """

    def __init__(self, train_dataset, val_dataset, batch_size: int, num_workers: int, k: int = NEIGHBOURS) -> None:
        self.k, self.num_train, self.num_val = k, len(train_dataset), len(val_dataset)
        self.num_classes = max(map(num_classes_of, (train_dataset, val_dataset)))
        self.labels, self.truths = (torch.tensor(d.get_targets()).long() for d in (train_dataset, val_dataset))
        same = torch.from_numpy(find_same_files(train_dataset, val_dataset))
        self.exclude = same if bool((same >= 0).any()) else None
        self.dataset = train_dataset if val_dataset is train_dataset else Joined(train_dataset, val_dataset)
        self.num_scored, self.bad = 0, {}
        self._own_bad: dict[int, str] = {}
        indices, self.num_batches = of_list(share_of(self.dataset), batch_size)
        endless = partial(repeated, indices, self.num_batches)
        builder = ImageBatches(self.dataset, endless, batch_size, _shape_of(self.dataset), skip_bad=True)
        self._batches = batches(builder, num_workers)

    def __call__(self, model: nn.Module) -> float | None:
        """Return the accuracy of ``model``, which maps images to features of length 1; its mode is not changed.

        None if no image of one of the datasets can be read.
        """
        self._own_bad = {}
        coming = map(self._fill, islice(self._batches, self.num_batches))
        features, is_read = extract_features_with_dataloader(model, coming, len(self.dataset))
        # summed, as a device may store an image that two processes had to read in another order than the next one
        is_read = to_host(distributed.all_reduce(is_read.long())).wait() == distributed.get_global_size()
        self.bad = {}
        if not is_read.all():  # in all processes
            reasons = {i: reason for own in distributed.gather_objects(self._own_bad) for i, reason in own.items()}
            self.bad = {i: reasons.get(i, "") for i in (~is_read).nonzero().flatten().tolist()}
        train, val = (part.nonzero().flatten() for part in (is_read[: self.num_train], is_read[-self.num_val :]))
        self.num_scored = len(val)
        if len(train) <= int(self.exclude is not None) or not len(val):
            return None
        device = features.device
        module = KnnModule(
            features.index_select(0, to_device(train, device)),
            to_device(self.labels[train], device),
            [self.k],
            TEMPERATURE,
            num_classes=self.num_classes,
        )
        queries = features.index_select(0, to_device(val + len(self.dataset) - self.num_val, device))
        truths, exclude = to_device(self.truths[val], device), None
        if self.exclude is not None:
            places = torch.full((self.num_train + 1,), -1)  # the last element is for index -1
            places[train] = torch.arange(len(train))
            exclude = to_device(places[self.exclude[val]], device)
        own = torch.arange(distributed.get_global_rank(), len(queries), distributed.get_global_size(), device=device)
        hits = torch.zeros((), dtype=torch.long, device=device)
        for rows in own.split(_QUERIES_A_STEP):
            (scores,) = module(queries[rows], exclude=None if exclude is None else exclude[rows]).values()
            hits += (scores.argmax(dim=1) == truths[rows]).sum()
        return int(to_host(distributed.all_reduce(hits)).wait()) / len(queries)

    def close(self) -> None:
        """End the processes that read images."""
        self._batches.close()

    def _fill(self, batch: Batch) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Return images, zeros for unreadable ones, as processes gather equal shapes; indices; which are read."""
        self._own_bad |= batch.bad
        images = batch.images
        if batch.bad:
            images = torch.cat([images, images.new_zeros(len(batch.bad), *images.shape[1:])])
        is_read = torch.tensor([1] * len(batch.indices) + [0] * len(batch.bad), dtype=torch.uint8)
        return images, (torch.tensor([*batch.indices, *batch.bad]), is_read)


def _shape_of(dataset) -> torch.Size:
    """Return the shape of the first readable image."""
    reason = ""
    for index in range(len(dataset)):
        try:
            return dataset[index][0].shape
        except (DataError, OSError) as e:
            if error := shortage(e, dataset.name(index)):
                raise error from e
            reason = reason or str(e)
    raise DataError(f"expected labelled images, got none that can be read, of {len(dataset)}: {reason}; repair them")
