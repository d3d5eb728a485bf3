"""Features of a whole dataset from a frozen model, in the dataset's order, in one process or several. Upstream's names.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from dinov2_custom import distributed
from dinov2_custom.data.adapters import DatasetWithEnumeratedTargets
from dinov2_custom.data.image_batches import ImageLoader, of_list
from dinov2_custom.errors import DataError
from dinov2_custom.utils.transfer import HostCopy, to_device, to_host

logger = logging.getLogger("dinov2")


class ModelWithAutocast(nn.Module):
    """Return a model's features in float32, computed in ``autocast_dtype``."""

    def __init__(self, model: nn.Module, autocast_dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.model = model
        self.autocast_dtype = autocast_dtype

    def forward(self, samples: Tensor) -> Tensor:
        """Map images (B, C, H, W) to features (B, D)."""
        with autocast(samples.device, self.autocast_dtype):
            return self.model(samples).float()


class ModelWithNormalize(ModelWithAutocast):
    """Return a model's features, scaled to length 1."""

    def forward(self, samples: Tensor) -> Tensor:
        """Map images (B, C, H, W) to features (B, D) of length 1."""
        return F.normalize(super().forward(samples), dim=1, p=2)


class ModelWithIntermediateLayers(nn.Module):
    """Return the (patches, class token) pairs of a backbone's last blocks, computed without gradients.

    Args:
        autocast_ctx: returns a context manager for the forward pass.
    """

    def __init__(self, feature_model: nn.Module, n_last_blocks: int, autocast_ctx=nullcontext) -> None:
        super().__init__()
        self.feature_model = feature_model.eval()
        self.n_last_blocks = n_last_blocks
        self.autocast_ctx = autocast_ctx

    @torch.inference_mode()
    def forward(self, images: Tensor) -> tuple[tuple[Tensor, Tensor], ...]:
        """Map images (B, C, H, W) to pairs (B, N, D), (B, D), in order of depth."""
        with self.autocast_ctx():
            return self.feature_model.get_intermediate_layers(images, self.n_last_blocks, return_class_token=True)


def autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager:
    """Return a context manager that computes in ``dtype``; a null context for float32."""
    return torch.autocast(device.type, dtype=dtype) if dtype != torch.float32 else nullcontext()


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    data_loader,
    postprocessors: Mapping[str, nn.Module],
    metrics: Mapping,
    device: torch.device,
    criterion: nn.Module | None = None,
) -> tuple[dict[str, float], dict]:
    """Pass the outputs of ``model`` through each postprocessor into the metrics of the same name.

    Args:
        postprocessors: each maps (outputs, targets) to ``{"preds": ..., "target": ...}``.
        metrics: torchmetrics; moved to ``device``.

    Returns:
        The mean loss (empty without ``criterion``), and ``{name: metric.compute()}``, over the images of all processes.
    """
    model.eval()
    for metric in metrics.values():
        metric.to(device)
    for postprocessor in postprocessors.values():
        postprocessor.to(device)
    total_loss, num_samples = torch.zeros((), dtype=torch.float64, device=device), 0
    for samples, targets in data_loader:
        outputs, targets = model(to_device(samples, device)), to_device(targets, device)
        if criterion is not None:
            total_loss += criterion(outputs, targets).double() * len(samples)
            num_samples += len(samples)
        for name, metric in metrics.items():
            metric.update(**postprocessors[name](outputs, targets))
    losses = {}
    if criterion is not None:
        sums = distributed.all_reduce(torch.stack([total_loss, torch.full_like(total_loss, num_samples)]))
        losses = {"loss": float(sums[0] / sums[1].clamp(min=1))}
    return losses, {name: metric.compute() for name, metric in metrics.items()}


def all_gather_and_flatten(tensor_rank: Tensor) -> Tensor:
    """Concatenate the tensors (n, ...) of all ranks, of equal shape, to (ranks * n, ...) in rank order."""
    if not distributed.is_enabled():
        return tensor_rank
    gathered = [torch.empty_like(tensor_rank) for _ in range(distributed.get_global_size())]
    dist.all_gather(gathered, tensor_rank.contiguous())
    return torch.cat(gathered)


def extract_features(
    model: nn.Module, dataset, batch_size: int, num_workers: int, gather_on_cpu: bool = False
) -> tuple[Tensor, Tensor]:
    """Return float32 features (N, D) and labels (N,) of ``dataset``, in its order, equal on every rank.

    Args:
        batch_size: images per step on each rank.
        gather_on_cpu: keep the result in CPU memory even if the model is on a GPU.

    Raises:
        DataError: the dataset is empty.
    """
    indices, stop = of_list(share_of(dataset), batch_size)
    images = DatasetWithEnumeratedTargets(dataset)
    loader = ImageLoader(images, indices, batch_size, num_workers=num_workers, stop=stop)
    return extract_features_with_dataloader(model, loader, len(dataset), gather_on_cpu)


def share_of(dataset) -> list[int]:
    """Return the indices of this process's images; the last ones repeat the first where that makes shares equal.

    Raises:
        DataError: the dataset is empty.
    """
    if not len(dataset):
        raise DataError("dataset: expected labelled images, got none; check --train-dataset and --val-dataset")
    rank, world_size = distributed.get_global_rank(), distributed.get_global_size()
    share = -(-len(dataset) // world_size)  # equal shares, since the features of all ranks are gathered in each step
    return [(i * world_size + rank) % len(dataset) for i in range(share)]


@torch.no_grad()  # not inference_mode, whose tensors FSDP2 would keep for the training that follows
def extract_features_with_dataloader(
    model: nn.Module, data_loader, sample_count: int, gather_on_cpu: bool = False
) -> tuple[Tensor, Tensor]:
    """Run :func:`extract_features` on a loader of ``(images, (indices, labels))``, where each rank has its own shard.

    On a GPU, no forward pass waits for the host, unless for the loader.

    Raises:
        DataError: some of the ``sample_count`` indices are missing.
    """
    device = next((p.device for p in model.parameters()), distributed.get_device())
    keep_on = torch.device("cpu") if gather_on_cpu else device
    features: Tensor | None = None
    labels: Tensor | None = None
    seen = torch.zeros(sample_count, dtype=torch.bool, device=keep_on)

    def keep(new_features: Tensor, new_labels: Tensor, indices: Tensor) -> None:
        features[indices], labels[indices] = new_features, new_labels
        seen.index_fill_(0, indices, True)

    coming: list[HostCopy] = []  # with ``gather_on_cpu``, the previous batch: the device computes during its copy
    for samples, (indices, labels_rank) in data_loader:
        features_rank = model(to_device(samples, device)).float()
        if features is None:
            features = torch.zeros(sample_count, features_rank.shape[-1], device=keep_on)
            labels = torch.zeros(sample_count, *labels_rank.shape[1:], dtype=labels_rank.dtype, device=keep_on)
        parts = [all_gather_and_flatten(to_device(part, device)) for part in (features_rank, labels_rank, indices)]
        if keep_on == device:
            keep(*parts)
            continue
        if coming:
            keep(*(part.wait() for part in coming))
        coming = [to_host(part) for part in parts]
    if coming:
        keep(*(part.wait() for part in coming))
    if features is None or not to_host(seen.all()).wait():
        raise DataError(f"dataset: expected the features of {sample_count} images, got {int(seen.sum())}")
    logger.debug(f"features: images={sample_count} dim={features.shape[1]}")
    return features, labels


def append_lines(path: Path, lines: Iterable[str]) -> None:
    """Append ``lines`` to the results file ``path``, on the main process only; create its folder."""
    if not distributed.is_main_process():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a", encoding="utf-8") as file:
        file.writelines(f"{line}\n" for line in lines)
    logger.info(f"results: {path}")
