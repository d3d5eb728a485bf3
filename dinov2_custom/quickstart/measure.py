"""Measure a trained network: kNN accuracy on held-out tiles, and the teacher's distribution over prototypes."""

from __future__ import annotations

import math
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dinov2_custom import distributed
from dinov2_custom.configs.load import load_run_config
from dinov2_custom.data.datasets import LabelledFolder
from dinov2_custom.data.transforms import Compose, MaybeToTensor, Normalize
from dinov2_custom.eval.neighbours import knn_accuracy
from dinov2_custom.eval.setup import get_autocast_dtype
from dinov2_custom.eval.utils import ModelWithNormalize, extract_features
from dinov2_custom.train.health import COLLAPSE_MARGIN
from dinov2_custom.train.ssl_meta_arch import SSLMetaArch, Targets, assignment_entropies
from dinov2_custom.utils.weights import read_weights

BATCH_SIZE = 256


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


def measure_run(run: Path, tiles: Path, final_dino_loss: float) -> tuple[Measurement, nn.Module, nn.Module]:
    """Compare raw pixels, the run's network before training and its newest teacher.

    Args:
        run: a finished training run.
        tiles: folder with ``train``, the neighbours, and ``held_out``, the tiles to classify.
        final_dino_loss: local + global loss at the end.

    Returns:
        The measurement, the untrained and the trained backbone.
    """
    cfg = load_run_config(str(run / "config.yaml"))
    device = distributed.get_device()
    datasets = load_tiles(tiles, Normalize(**cfg.data.normalize))
    dtype = get_autocast_dtype(cfg, device)
    untrained, trained = SSLMetaArch(cfg).to(device).eval(), SSLMetaArch(cfg).to(device).eval()
    trained.teacher.load_state_dict(read_weights(newest_teacher(run))["teacher"], strict=True)
    backbones = untrained.teacher["backbone"], trained.teacher["backbone"]
    networks = (ModelWithNormalize(model.eval(), dtype) for model in (nn.Flatten(), *backbones))
    raw, before, after = (knn_accuracy(network, *datasets, BATCH_SIZE, 0) for network in networks)
    probabilities = assignments(cfg, trained, datasets[1], dtype)
    entropies = {name: float(v) for name, v in assignment_entropies(Targets(probabilities, None)).items()}
    num_prototypes = probabilities.shape[1]
    measurement = Measurement(
        raw_pixels=raw,
        untrained=before,
        trained=after,
        **entropies,
        prototypes_used=int(probabilities.argmax(dim=1).unique().numel()),
        num_prototypes=num_prototypes,
        final_dino_loss=final_dino_loss,
        collapse=describe_collapse(final_dino_loss, **entropies, num_prototypes=num_prototypes),
    )
    return measurement, *backbones


def load_tiles(folder: Path, normalize: Normalize) -> list[LabelledFolder]:
    """Return the training and the held-out tiles as datasets, at their full size."""
    transform = Compose([MaybeToTensor(), normalize])
    return [LabelledFolder(str(folder / part), transform=transform) for part in ("train", "held_out")]


def newest_teacher(run: Path) -> Path:
    """Return the teacher checkpoint of the last iteration of ``run``."""
    return max(run.glob("eval/training_*/teacher_checkpoint.pth"), key=lambda path: int(path.parent.name.split("_")[1]))


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
