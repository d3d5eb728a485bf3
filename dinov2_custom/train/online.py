"""Evaluation of the teacher during a run (``evaluation.online``), compared with the weights that the run started from.

One forward pass over a fixed set of images with fixed crops and masks gives everything but kNN: the losses, and the
teacher's class tokens of both global crops of each image. Nothing is drawn from a random stream of the training, and
no weight, centre or statistic changes, so the weights of a run do not depend on it.

The host reads nothing from the device before it has submitted the last forward pass, so a GPU does not wait for it in
between. Only RankMe is then computed on the host: on a GPU, singular values take longer.
"""

from __future__ import annotations

import hashlib
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinov2_custom import distributed
from dinov2_custom.data.loaders import TrainLoader
from dinov2_custom.data.pool import allocate, workers_of_choice
from dinov2_custom.data.samples import TrainBatches, TrainSamples, unpack, with_path
from dinov2_custom.data.transforms import make_central_crop_transform
from dinov2_custom.errors import DataError, command
from dinov2_custom.eval.datasets import open_pair
from dinov2_custom.eval.neighbours import KnnAccuracy
from dinov2_custom.eval.utils import ModelWithNormalize, all_gather_and_flatten
from dinov2_custom.reading import reading_of
from dinov2_custom.train.health import rankme
from dinov2_custom.train.ssl_meta_arch import SSLMetaArch
from dinov2_custom.train.teacher_file import save_atomically, teacher_path
from dinov2_custom.utils.dtype import resolve_dtype
from dinov2_custom.utils.rng import seed_for
from dinov2_custom.utils.run_folder import BEST
from dinov2_custom.utils.transfer import to_device, to_host

logger = logging.getLogger("dinov2")
START_FILE = Path("eval") / "online_start.pth"
MAX_SHARE = 0.03  # of the time
WARN_AFTER_S = 600  # what a shorter run loses is not worth a warning
PIXELS_SIDE = 32  # of the images whose raw pixels are compared by kNN
KNN_BATCH = 64
MAX_OTHERS = 0.05  # share of the labelled images by which those read may differ from the start's
FEW_LABELLED = 20  # images to classify, with which chance alone changes kNN by up to 0.22
OF_IMAGES = ("rankme", "uniformity", "alignment")  # of the start, besides kNN


class OnlineEvaluation:
    """Evaluate the teacher every ``evaluation.online.every`` iterations and at the end. All processes call all methods.

    Call :meth:`close` at the end.

    Attributes:
        start_is_due: whether :meth:`evaluate_start` has to be called before the first step.
        is_best: whether the last evaluation was the best so far.
        facts: values to store beside the teacher, if it was.
        start: evaluation of the start, in the main process; ``features`` is None, and values are missing, where the
            evaluation has changed since.
        readable: draws whose images can be read, the same in all processes; None before they are read.

    Raises:
        ConfigError, DataError: the datasets of kNN cannot be used.
    """

    def __init__(self, cfg, loader: TrainLoader) -> None:
        self.cfg, self.options, self.out = cfg, cfg.evaluation.online, Path(cfg.train.output_dir)
        self.every, self.is_best, self.facts, self.start = self.options.every, False, {}, None
        self.start_is_due, self.readable = False, None
        self._measured_from: tuple[int, float] | None = None
        self._warned, self._began = False, time.perf_counter()
        if not self.every:
            return
        dataset, self.where = loader.held_out, "held-out images"
        if dataset is None:
            dataset, self.where = loader.builder.samples.dataset, "training images, as none are held out (train.frac)"
        self.loader, self.num_images = loader, min(self.options.images, len(dataset))
        self.samples = TrainSamples(
            dataset,
            loader.builder.samples.augment,
            seed_for(cfg.train.seed, "online"),
            dct_scaling=cfg.data.dct_scaling,
        )
        self._batches: list[tuple[dict, int]] = []
        self.labelled = _open_labelled(cfg) if self.options.knn_train else None
        if self.labelled is not None:
            workers = workers_of_choice(cfg.train.num_workers, distributed.share_of_cores())
            try:
                self.knn = KnnAccuracy(*self.labelled, KNN_BATCH, workers)
            except DataError as e:
                raise DataError(f"evaluation.online.knn_train, evaluation.online.knn_val: {e}") from e
            self._known_bad: set[int] = set()
        metric = self.options.best if self.options.best != "auto" else ("knn" if self.labelled else "rankme")
        self.metric, self.sign = f"eval_{metric}", -1 if metric == "loss" else 1
        self.best, self._since, self._best_of = -math.inf, None, None

    def begin(self, rows: Sequence[Mapping[str, float]], resumed: bool) -> None:
        """Continue after ``rows``, which the main process has.

        Args:
            resumed: whether the run continues; its start is then in ``START_FILE``.
        """
        if not self.every:
            return
        best = (-math.inf, None, None)
        self.start_is_due = self.options.compare_to_start and not resumed
        if distributed.is_main_process():
            if resumed and self.options.compare_to_start:
                self.start = self._read_start()
            if resumed and self.options.best != "none":
                best = self._read_best(rows)
            if not resumed:  # of an attempt that left no checkpoint
                teacher_path(self.out, BEST).unlink(missing_ok=True)
        self.best, self._since, self._best_of = distributed.broadcast_object(best)
        for doubt in self._doubts():
            logger.warning(doubt)
        logger.info(f"evaluation: every {self.every} iterations, {self.num_images} {self.where}")

    def is_due(self, iteration: int, last: bool) -> bool:
        return bool(self.every) and (last or (iteration + 1) % self.every == 0)

    def evaluate_start(self, model: SSLMetaArch, teacher_temp: float) -> None:
        """Evaluate the initial weights, and raw pixels, and store the result for resumes."""
        features, _ = self._features(model, teacher_temp)
        pending = None if features is None else Pending(geometry(features), features[:, 0])
        values = self._knn("start_knn", model.teacher["backbone"])
        values |= self._knn("pixels_knn", nn.Sequential(Shrink(), nn.Flatten()))
        values.pop("knn_images", None)
        self.start_is_due, self._measured_from = False, (-1, time.perf_counter())
        if distributed.is_main_process():
            values |= {f"start_{name}": value for name, value in pending.read().items()} if pending else {}
            self.start = {
                "features": pending.features.wait().contiguous() if pending else None,
                "values": _finite(values),
                "readable": self.readable,
                "images": self._digest_of_images,
                "labelled": self._digest_of_labelled,
                "left_out": sorted(self.knn.bad) if self.labelled else [],
            }
            save_atomically(self.start, self.out / START_FILE)

    def evaluate(
        self, model: SSLMetaArch, iteration: int, teacher_temp: float, training_loss: Callable[[], float]
    ) -> dict:
        """Return the values of the teacher after ``iteration`` for its row, the same in all processes, and log them.

        Args:
            training_loss: called for the log after the evaluation, since it may wait for the device.
        """
        began = time.perf_counter()
        features, loss = self._features(model, teacher_temp)
        start = self.start or {"features": None, "values": {}, "left_out": []}
        pending = None
        if features is not None:
            values = {"loss": loss} | geometry(features)
            if start["features"] is not None:
                values |= similarity(features[:, 0], to_device(start["features"], features.device))
            pending = Pending(values, features[:, 0])
        row = self._knn("eval_knn", model.teacher["backbone"])
        if distributed.is_main_process():
            others = len(self.knn.bad.keys() ^ set(start["left_out"])) if "eval_knn" in row else 0
            if others and others > MAX_OTHERS * len(self.knn.dataset):
                logger.warning(
                    f"evaluation: no kNN, because {others} labelled images could be read at the start and not now, or "
                    "the reverse, so the accuracies cannot be compared; restore them"
                )
                row = {}
            row |= {f"eval_{name}": value for name, value in pending.read().items()} if pending else {}
            row |= {key: value for key, value in start["values"].items() if f"eval_{key.partition('_')[2]}" in row}
        row = distributed.broadcast_object(_finite(row) | {"eval_s": time.perf_counter() - began})
        if self._best_of is not None and self._best_of != self._of_best():
            self._start_best_anew()
        self._since = iteration if self._since is None else self._since
        value = self.sign * row[self.metric] if self.metric in row else -math.inf
        self.is_best = self.options.best != "none" and value > self.best
        if self.is_best:
            self._best_of = self._of_best()
            about = {"of": self._best_of, "since": self._since}
            self.best, self.facts = value, {"iteration": iteration, self.metric: row[self.metric], "evaluation": about}
        logger.info(f"evaluation: {describe(row, training_loss())}{self._describe_share(iteration, row['eval_s'])}")
        return row

    def close(self) -> None:
        """End the processes that read labelled images."""
        if self.every and self.labelled is not None:
            self.knn.close()

    def _features(self, model: SSLMetaArch, teacher_temp: float) -> tuple[Tensor | None, Tensor | None]:
        """Return the teacher's class tokens (N, 2, D) of both global crops, and the loss, float32, on the device.

        None if no image can be read. The loss includes the readable images that replace unreadable ones.
        """
        if self.readable is None:
            self._read_images()
        if not self.readable:
            return None, None
        tokens, losses = [], []
        for arrays, upperbound in self._batches:
            batch = unpack(arrays, upperbound, self.loader.finish, model.device)
            terms, cls = model.evaluate(batch, teacher_temp)
            losses.append(sum(terms.values()))
            tokens.append(cls.float().unflatten(0, (2, -1)).transpose(0, 1))
        loss = distributed.all_reduce(torch.stack(losses).mean(), average=True)
        gathered = all_gather_and_flatten(torch.stack(tokens)).unflatten(0, (-1, len(tokens)))
        in_order = gathered.transpose(0, 1).flatten(0, 2)  # of draws: batch, process, image
        if len(self.readable) < self.num_images:
            return in_order.index_select(0, to_device(torch.tensor(self.readable), in_order.device)), loss
        return in_order[: self.num_images], loss

    def _read_images(self) -> None:
        """Read the images once; warn about unreadable ones, and if the start had others."""
        rank, world_size = distributed.get_global_rank(), distributed.get_global_size()
        size = min(self.cfg.train.batch_size_per_gpu, -(-self.num_images // world_size))
        place = {"batch_size": size, "rank": rank, "world_size": world_size}
        builder = TrainBatches(self.samples, self.loader.builder.masks, **place)
        complete, bad = True, {}
        for index in range(-(-self.num_images // (size * world_size))):
            arrays = allocate(builder.fields)
            report = builder.build(index, arrays)
            complete = complete and report.complete
            for draw, path, reason in reversed(report.bad):  # the first of a draw is not a replacement
                bad[draw] = with_path(path, reason)
            self._batches.append((arrays, report.upperbound))
        reports = distributed.gather_objects((complete, bad))
        bad = {draw: text for _, own in reports for draw, text in own.items() if draw < self.num_images}
        # a draw without any replacement means that (nearly) none of the dataset can be read
        complete = all(complete for complete, _ in reports)
        kind = self.where.partition(",")[0]
        self.readable = [draw for draw in range(self.num_images) if draw not in bad] if complete else []
        if not self.readable:
            logger.warning(
                f"evaluation: no RankMe and no loss, as none of the {self.num_images} {kind} can be read: "
                f"{next(iter(bad.values()), '')}; make them readable, then stop and resume the run"
            )
        elif bad:
            logger.warning(
                f"evaluation: {len(bad)} of the {self.num_images} {kind} cannot be read and are left out: "
                f"{next(iter(bad.values()))}; {command('run/data/verify.py')} lists them all"
            )
        if self.start is not None and self.start["features"] is not None and self.start["readable"] != self.readable:
            logger.warning(
                f"evaluation: no comparison with the start except kNN, because {len(self.start['readable'])} of its "
                f"images could be read then, and {len(self.readable)}, or others, now"
            )
            _leave_out_images(self.start)

    def _knn(self, name: str, network: nn.Module) -> dict[str, float]:
        if self.labelled is None:
            return {}
        dtype = self.cfg.compute_precision.teacher.backbone.mixed_precision.param_dtype
        accuracy = self.knn(ModelWithNormalize(network, resolve_dtype(dtype, distributed.get_device())))
        if self.knn.bad.keys() != self._known_bad:
            self._known_bad = set(self.knn.bad)
            self._warn_of_bad_labelled()
        return {} if accuracy is None else {name: accuracy, "knn_images": self.knn.num_scored}

    def _warn_of_bad_labelled(self) -> None:
        """Warn about the labelled images that cannot be read, for each dataset, with an example."""
        datasets = {"evaluation.online.knn_train": 0, "evaluation.online.knn_val": self.knn.num_train}
        if self.labelled[0] is self.labelled[1]:
            datasets = {", ".join(datasets): 0}
        for (key, first), dataset in zip(datasets.items(), self.labelled, strict=False):
            bad = {i: reason for i, reason in self.knn.bad.items() if first <= i < first + len(dataset)}
            if not bad:
                continue
            index, reason = next(iter(bad.items()))
            rest = "are left out of kNN; repair or restore them, as every evaluation reads them again"
            if len(bad) == len(dataset):
                rest = "there is no kNN; restore the folder, as every evaluation reads it again"
            logger.warning(
                f"{key}: {len(bad):,} of {len(dataset):,} images cannot be read and {rest}: for example "
                f"{with_path(self.knn.dataset.name(index), reason)}"
            )

    def _doubts(self) -> list[str]:
        """Return warnings about evaluations that can say little."""
        doubts = []
        if self.num_images < 2:
            doubts.append(
                f"evaluation.online.images: expected at least 2, got {self.num_images}: RankMe is 1, and "
                "uniformity and CKA are undefined; raise it, or hold out more (train.frac)"
            )
        if self.labelled is None:
            return doubts
        for name, dataset in zip(("knn_train", "knn_val"), self.labelled, strict=True):
            if len(np.unique(dataset.get_targets())) < 2:
                doubts.append(
                    f"evaluation.online.{name}: expected images of at least 2 classes, got one, for which the "
                    "accuracy is always 1; use one folder per class"
                )
        if (number := len(self.labelled[1])) < FEW_LABELLED:
            doubts.append(
                f"evaluation.online.knn_val: {number} images; chance alone changes kNN by up to {number**-0.5:.2f}, "
                "1/sqrt(images); use some hundreds"
            )
        return doubts

    @cached_property
    def _digest_of_images(self) -> str:
        """Return a digest of the names of the images."""
        return _digest([self.samples.dataset.name(self.samples.image_of(draw)) for draw in range(self.num_images)])

    @cached_property
    def _digest_of_labelled(self) -> str:
        """Return a digest of the names of the labelled images."""
        return _digest([d.name(index) for d in self.labelled or () for index in range(len(d))])

    def _of_best(self) -> dict[str, Any]:
        """Return what the values of the best teacher's metric depend on, besides the weights."""
        if self.metric == "eval_knn":
            return {"metric": self.metric, "data": self._digest_of_labelled}
        return {"metric": self.metric, "data": self._digest_of_images, "readable": self.readable}

    def _read_best(self, rows: Sequence[Mapping[str, float]]) -> tuple[float, int | None, dict[str, Any] | None]:
        """Return the best value so far, the first iteration of the evaluation that chose it, and what it depends on."""
        path = teacher_path(self.out, BEST)
        if not path.exists():
            return -math.inf, None, None
        try:
            about = torch.load(path, weights_only=True, mmap=True)["evaluation"]
            of, since = dict(about["of"]), int(about["since"])
        except Exception:  # torch raises many types on torn files
            of, since = {}, 0
        if of.keys() != self._of_best().keys() or any(of[key] != self._of_best()[key] for key in ("metric", "data")):
            self._start_best_anew()
            return -math.inf, None, None
        best = max(
            (self.sign * row[self.metric] for row in rows if row["iteration"] >= since and self.metric in row),
            default=-math.inf,
        )
        return best, since if best > -math.inf else None, of

    def _start_best_anew(self) -> None:
        """Forget the best value so far, which another evaluation measured."""
        logger.warning(
            f"evaluation.online.best: {teacher_path(self.out, BEST)} is damaged, or was chosen by another evaluation "
            "(metric, datasets or images), whose values cannot be compared with this one's; the best of this one "
            "replaces it"
        )
        self.best, self._since, self._best_of = -math.inf, None, None

    def _read_start(self) -> dict[str, Any] | None:
        """Return the evaluation of the start without what cannot be compared with; warn of that."""
        path = self.out / START_FILE
        if not path.exists():
            logger.warning(
                f"evaluation: no comparison with the start, because the run began without evaluation.online (no {path})"
            )
            return None
        try:
            start = torch.load(path, weights_only=True)
            keys = ("features", "values", "readable", "images", "labelled", "left_out")
            start = {key: start[key] for key in keys}
            start["values"] = dict(start["values"])
        except Exception as e:  # torch raises many types on torn files
            logger.warning(
                f"evaluation: no comparison with the start: expected its evaluation, got a damaged file or another "
                f"kind of file ({type(e).__name__}): {path}; restore it from a copy and resume again, or remove it"
            )
            return None
        if start["images"] != self._digest_of_images:
            logger.warning(
                f"evaluation: no comparison with the start except kNN, because its images ({path}) were others"
            )
            _leave_out_images(start)
        if start["labelled"] != self._digest_of_labelled:
            start["left_out"] = []
            start["values"] = {key: value for key, value in start["values"].items() if not key.endswith("_knn")}
            if self.labelled is not None:
                logger.warning(
                    "evaluation: no start_knn and no pixels_knn, because the run began with other kNN datasets, or "
                    "none; they cannot be measured later. If the run began from released weights, evaluate these with "
                    f"{command('run/eval/knn.py')}"
                )
        return start

    def _describe_share(self, iteration: int, seconds: float) -> str:
        """Return the share of the time since the evaluation before.

        Above ``MAX_SHARE``, warn once, after ``WARN_AFTER_S``.
        """
        now, before = time.perf_counter(), self._measured_from
        self._measured_from = (iteration, now)
        if before is None or iteration - before[0] != self.every:
            return ""
        share = seconds / (now - before[1])
        if share > MAX_SHARE and not self._warned and now - self._began > WARN_AFTER_S:
            self._warned = True
            iteration_s = (now - before[1] - seconds) / self.every
            enough = math.ceil(seconds * (1 / MAX_SHARE - 1) / iteration_s)
            logger.warning(
                f"evaluation.online takes {share:.1%} of the time; evaluation.online.every="
                f"{enough} or fewer images would take {MAX_SHARE:.0%}"
            )
        return f", {share:.1%} of the time"


class Pending:
    """Numbers and ``features`` (N, D) on the way from the device to the host."""

    def __init__(self, numbers: Mapping[str, Tensor], features: Tensor) -> None:
        self.names, self.features = list(numbers), to_host(features)
        self.numbers = to_host(torch.stack([number.double() for number in numbers.values()]))

    def read(self) -> dict[str, float]:
        """Return the numbers and the features' RankMe; wait for the device if necessary."""
        return dict(zip(self.names, self.numbers.tolist(), strict=True)) | {"rankme": rankme(self.features.wait())}


class Shrink(nn.Module):
    """Reduce images to at most ``PIXELS_SIDE`` pixels a side, as kNN on all pixels takes too much memory."""

    def forward(self, images: Tensor) -> Tensor:
        sides = [min(side, PIXELS_SIDE) for side in images.shape[-2:]]
        return F.adaptive_avg_pool2d(images, sides)


def _open_labelled(cfg) -> tuple[Any, Any]:
    """Open the datasets of kNN, with the central crop at the size of training's global crops."""
    transform = make_central_crop_transform(cfg.crops.global_crops_size, **cfg.data.normalize)
    strings = {f"evaluation.online.{name}": cfg.evaluation.online[name] for name in ("knn_train", "knn_val")}
    return open_pair(*((key, string, transform) for key, string in strings.items()), reading_of(cfg))


def geometry(features: Tensor) -> dict[str, Tensor]:
    """Return uniformity and alignment, on the device, of features (N, 2, D) of two crops of each image.

    Source: Wang and Isola 2020, eq. 1 and 2 with alpha = t = 2, on features of length 1.
    """
    first, second = F.normalize(features.double(), dim=-1).unbind(1)
    values = {"alignment": (first - second).square().sum(dim=-1).mean()}
    if (number := len(first)) > 1:
        squares = 2 - 2 * first @ first.T  # faster than pdist, and accurate to 1e-15
        values["uniformity"] = (squares.mul(-2).exp().fill_diagonal_(0).sum() / (number * (number - 1))).log()
    return values


def similarity(features: Tensor, start: Tensor) -> dict[str, Tensor]:
    """Return the mean cosine and the linear CKA, on the device, of two sets of features (N, D) of the same images.

    Source: Kornblith et al. 2019, linear CKA.
    """
    now, before = features.double(), start.double()
    cosine = F.cosine_similarity(now, before).mean()
    grams = [centred @ centred.T for centred in (one - one.mean(dim=0) for one in (now, before))]
    alike = (grams[0] * grams[1]).sum() / (grams[0].norm() * grams[1].norm())
    return {"cosine_to_start": cosine, "cka_to_start": alike}


def describe(row: Mapping[str, float], training_loss: float) -> str:
    """Return the values of a row as text: each with the start's, and the loss with the training's."""
    parts = []
    for label, name, digits in (
        ("kNN", "knn", ".3f"),
        ("RankMe", "rankme", ".1f"),
        ("uniformity", "uniformity", ".2f"),
        ("alignment", "alignment", ".3f"),
    ):
        found = {"": f"eval_{name}", "start ": f"start_{name}", "pixels ": f"pixels_{name}"}
        values = [f"{who}{row[key]:{digits}}" for who, key in found.items() if key in row]
        parts += [f"{label} {', '.join(values)}"] if values else []
    if "eval_loss" in row:
        parts.append(f"loss {row['eval_loss']:.3f}, training {training_loss:.3f}")
    to_start = {"cosine": row.get("eval_cosine_to_start"), "CKA": row.get("eval_cka_to_start")}  # undefined for 1 image
    if found := [f"{label} {value:.3f}" for label, value in to_start.items() if value is not None]:
        parts.append(f"to the start: {', '.join(found)}")
    return f"{'; '.join(parts)}; {row['eval_s']:.1f} s"


def _digest(texts: Sequence[str]) -> str:
    return hashlib.blake2b("\n".join(texts).encode(errors="surrogateescape")).hexdigest()


def _leave_out_images(start: dict[str, Any]) -> None:
    """Remove from ``start`` everything that depends on the images of the evaluation."""
    start["features"] = None
    start["values"] = {k: v for k, v in start["values"].items() if k.removeprefix("start_") not in OF_IMAGES}


def _finite(values: Mapping[str, float]) -> dict[str, float]:
    return {name: value for name, value in values.items() if math.isfinite(value)}
