"""Collect what is known of a trained network: kNN accuracy, and the teacher's distribution over prototypes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dinov2_custom import distributed
from dinov2_custom.configs.load import load_run_config
from dinov2_custom.data.datasets import LabelledFolder
from dinov2_custom.data.transforms import Compose, MaybeToTensor, Normalize, make_central_crop_transform
from dinov2_custom.errors import DataError
from dinov2_custom.eval.setup import get_autocast_dtype
from dinov2_custom.eval.utils import ModelWithNormalize, extract_features
from dinov2_custom.plots.metrics_file import dino_loss
from dinov2_custom.train.health import COLLAPSE_MARGIN
from dinov2_custom.train.online import Shrink
from dinov2_custom.train.ssl_meta_arch import SSLMetaArch, Targets, assignment_entropies
from dinov2_custom.utils.run_folder import find_weights
from dinov2_custom.utils.weights import read_weights

BATCH_SIZE = 256
ACCURACIES = {"raw_pixels": "pixels_knn", "untrained": "start_knn", "trained": "eval_knn"}  # keys of the metrics' rows


class Measurement(NamedTuple):
    """Accuracies in 0..1, entropies in nats; ``collapse`` describes how the run collapsed, "" if it did not."""

    raw_pixels: float
    untrained: float
    trained: float
    teacher_entropy: float
    prototype_entropy: float
    prototypes_used: int
    num_prototypes: int
    final_dino_loss: float
    collapse: str

    @property
    def gain(self) -> float:
        return self.trained - self.untrained


class Measured(NamedTuple):
    """The numbers of a run, and what they were measured with.

    ``networks`` maps "raw pixels", "untrained" and "trained" to functions from images to features of length 1;
    ``train`` and ``held_out`` are the tiles as these functions get them, ``crop`` pixels high.
    """

    numbers: Measurement
    networks: dict[str, nn.Module]
    train: LabelledFolder
    held_out: LabelledFolder
    crop: int
    normalize: Normalize


def measure_run(run: Path, tiles: Path, row: Mapping[str, float]) -> Measured:
    """Return the accuracies of the run's own last evaluation, and the distribution of held-out tiles over prototypes.

    Args:
        run: a finished training run.
        tiles: folder with ``train``, the neighbours, and ``held_out``, the tiles to classify.
        row: the last row of the run's metrics.

    Raises:
        DataError: the row has no evaluation.
    """
    missing = [key for key in ACCURACIES.values() if key not in row]
    if missing:
        raise DataError(
            f"{run}: expected {', '.join(missing)} in the last row of the metrics, got a run without evaluation.online "
            "from its start; train again with --no-resume, or choose another --output-dir"
        )
    cfg = load_run_config(str(run / "config.yaml"))
    device, dtype = distributed.get_device(), get_autocast_dtype(cfg)
    untrained, trained = SSLMetaArch(cfg).to(device).eval(), SSLMetaArch(cfg).to(device).eval()
    trained.teacher.load_state_dict(read_weights(find_weights(str(run)))["teacher"], strict=True)
    probabilities = assignments(cfg, trained, load_tiles(tiles, Normalize(**cfg.data.normalize))[1], dtype)
    entropies = {name: float(v) for name, v in assignment_entropies(Targets(probabilities, None)).items()}
    num_prototypes, final_dino_loss = probabilities.shape[1], dino_loss(row)
    numbers = Measurement(
        **{name: row[key] for name, key in ACCURACIES.items()},
        **entropies,
        prototypes_used=int(probabilities.argmax(dim=1).unique().numel()),
        num_prototypes=num_prototypes,
        final_dino_loss=final_dino_loss,
        collapse=describe_collapse(final_dino_loss, **entropies, num_prototypes=num_prototypes),
    )
    models = {
        "raw pixels": nn.Sequential(Shrink(), nn.Flatten()),
        "untrained": untrained.teacher["backbone"],
        "trained": trained.teacher["backbone"],
    }
    crop, statistics = cfg.crops.global_crops_size, dict(cfg.data.normalize)
    transform = make_central_crop_transform(crop, **statistics)
    datasets = (LabelledFolder(str(tiles / part), transform=transform) for part in ("train", "held_out"))
    networks = {name: ModelWithNormalize(model.eval(), dtype) for name, model in models.items()}
    return Measured(numbers, networks, *datasets, crop, Normalize(**statistics))


def load_tiles(folder: Path, normalize: Normalize) -> list[LabelledFolder]:
    """Return the training and the held-out tiles as datasets, at their full size."""
    transform = Compose([MaybeToTensor(), normalize])
    return [LabelledFolder(str(folder / part), transform=transform) for part in ("train", "held_out")]


@torch.inference_mode()
def assignments(cfg, model: SSLMetaArch, dataset, dtype: torch.dtype) -> Tensor:
    """Return the teacher's probabilities (N, K) over prototypes for ``dataset``, balanced as in training."""
    features, _ = extract_features(_ClassTokenLogits(model, dtype), dataset, BATCH_SIZE, 0)
    if cfg.train.centering == "sinkhorn_knopp":
        return model.dino_loss.sinkhorn_knopp_teacher(features, teacher_temp=cfg.teacher.teacher_temp)
    return torch.softmax((features - features.mean(dim=0)) / cfg.teacher.teacher_temp, dim=-1)


class _ClassTokenLogits(nn.Module):
    def __init__(self, model: SSLMetaArch, dtype: torch.dtype) -> None:
        super().__init__()
        self.teacher, self.dtype = model.teacher, dtype

    def forward(self, images: Tensor) -> Tensor:
        with torch.autocast(images.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32):
            return self.teacher["dino_head"](self.teacher["backbone"](images)).float()


def describe_collapse(dino_loss: float, teacher_entropy: float, prototype_entropy: float, num_prototypes: int) -> str:
    """Describe how a run collapsed; return "" if it did not.

    Args:
        dino_loss: local + global, near ln(``num_prototypes``) for a network with the same output for all images.
        teacher_entropy: mean over the assignments, in nats; near ln(``num_prototypes``) if the teacher is undecided.
        prototype_entropy: of the mean assignment, in nats; near 0 if one prototype takes every image.
    """
    uniform = math.log(num_prototypes)
    if abs(dino_loss - uniform) < COLLAPSE_MARGIN * uniform:
        return f"the loss sits at ln(prototypes) = {uniform:.3f}, as if all images were the same"
    if teacher_entropy > (1 - COLLAPSE_MARGIN) * uniform:
        return f"every image is spread evenly over all prototypes, entropy {teacher_entropy:.3f} of {uniform:.3f}"
    if prototype_entropy < COLLAPSE_MARGIN * uniform:
        return "one prototype takes every image"
    return ""
