"""Train linear classifiers on frozen features, as upstream's ``eval/linear.py``: 52 at once, the best is reported.

One for every combination of 13 learning rates, the last or the last four blocks, with or without the mean patch.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import default_collate

from dinov2_custom import distributed, entry
from dinov2_custom.data.depth import Reading
from dinov2_custom.data.image_batches import ImageLoader
from dinov2_custom.data.transforms import make_classification_eval_transform, make_classification_train_transform
from dinov2_custom.errors import CheckpointError, ConfigError, remedy
from dinov2_custom.eval.args import get_linear_args_parser as get_args_parser
from dinov2_custom.eval.datasets import (
    draws_for_training,
    every_image_once,
    match_classes,
    num_classes_of,
    open_labelled,
    warn_of_same_files,
)
from dinov2_custom.eval.metrics import MetricType, build_metric
from dinov2_custom.eval.setup import check_positive, choose_sizes, evaluation, setup_and_build_model
from dinov2_custom.eval.utils import ModelWithIntermediateLayers, append_lines, autocast, evaluate
from dinov2_custom.files import write_text
from dinov2_custom.logging import MetricLogger, open_log
from dinov2_custom.parallel import GradientReducer
from dinov2_custom.train.checkpoint import save_atomically
from dinov2_custom.utils.checkpoint_folder import check_whole
from dinov2_custom.utils.rng import generator_for
from dinov2_custom.utils.run_folder import last_checkpoint
from dinov2_custom.utils.transfer import to_device
from dinov2_custom.utils.weights import read_weights

logger = logging.getLogger("dinov2")
N_LAST_BLOCKS = (1, 4)
RUNNING_CHECKPOINT = "running_checkpoint_linear_eval"
METRICS_FILE = "results_eval_linear.json"
_SEED = 0
# (patches (B, N, D), class token (B, D)) of some blocks, in order of depth
Tokens = Sequence[tuple[Tensor, Tensor]]
_MIN_DECIMALS, _MAX_DECIMALS = 5, 15


def create_linear_input(x_tokens_list: Tokens, use_n_blocks: int, use_avgpool: bool) -> Tensor:
    """Return (B, (use_n_blocks [+ 1]) * D) float32: the last blocks' class tokens [and the last block's mean patch]."""
    blocks = x_tokens_list[-use_n_blocks:]
    parts = [class_token for _, class_token in blocks]
    if use_avgpool:
        parts.append(blocks[-1][0].mean(dim=1))
    return torch.cat(parts, dim=-1).float()


class LinearClassifier(nn.Module):
    """One linear layer over :func:`create_linear_input`; weights start at N(0, 0.01), biases at 0.

    Args:
        out_dim: length of its input features.
        generator: for the weights; None for torch's global one.
    """

    def __init__(
        self,
        out_dim: int,
        use_n_blocks: int,
        use_avgpool: bool,
        num_classes: int = 1000,
        *,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.out_dim, self.use_n_blocks, self.use_avgpool = out_dim, use_n_blocks, use_avgpool
        self.num_classes = num_classes
        self.linear = nn.utils.skip_init(nn.Linear, out_dim, num_classes)
        nn.init.normal_(self.linear.weight, mean=0.0, std=0.01, generator=generator)
        nn.init.zeros_(self.linear.bias)

    def forward(self, x_tokens_list: Tokens) -> Tensor:
        """Return logits (B, num_classes)."""
        return self.linear(create_linear_input(x_tokens_list, self.use_n_blocks, self.use_avgpool))


class AllClassifiers(nn.Module):
    """Named classifiers applied to the same tokens."""

    def __init__(self, classifiers_dict: Mapping[str, LinearClassifier]) -> None:
        super().__init__()
        self.classifiers_dict = nn.ModuleDict(classifiers_dict)

    def forward(self, inputs: Tokens) -> dict[str, Tensor]:
        """Return ``{name: logits}``; inputs shared by classifiers are computed once."""
        made: dict[tuple[int, bool], Tensor] = {}
        logits = {}
        for name, classifier in self.classifiers_dict.items():
            kind = classifier.use_n_blocks, classifier.use_avgpool
            if kind not in made:
                made[kind] = create_linear_input(inputs, *kind)
            logits[name] = classifier.linear(made[kind])
        return logits

    def __len__(self) -> int:
        return len(self.classifiers_dict)


class LinearPostprocessor(nn.Module):
    """Map tokens to a metric's arguments: ``{"preds": logits, "target": targets}``.

    Args:
        class_mapping: index of the training class for each target class; None if they are the same.
    """

    def __init__(self, linear_classifier: LinearClassifier, class_mapping: Sequence[int] | None = None) -> None:
        super().__init__()
        self.linear_classifier = linear_classifier
        self.register_buffer("class_mapping", None if class_mapping is None else torch.as_tensor(class_mapping).long())

    def forward(self, samples: Tokens, targets: Tensor) -> dict[str, Tensor]:
        preds = self.linear_classifier(samples)
        if self.class_mapping is not None:
            preds = preds[:, self.class_mapping.to(preds.device)]
        return {"preds": preds, "target": targets}


def scale_lr(learning_rates: float, batch_size: int) -> float:
    """Scale a learning rate given for 256 images to the global batch."""
    return learning_rates * (batch_size * distributed.get_global_size()) / 256.0


def setup_linear_classifiers(
    sample_output: Tokens,
    n_last_blocks_list: Sequence[int],
    learning_rates: Sequence[float],
    batch_size: int,
    num_classes: int = 1000,
) -> tuple[AllClassifiers, list[dict]]:
    """Create one classifier for each number of blocks, with and without mean patch, and each learning rate.

    Args:
        sample_output: tokens of any image, which determine widths and device.
        learning_rates: for 256 images; see :func:`scale_lr`.
        batch_size: images per step on each rank.

    Returns:
        The classifiers, by upstream's names (see :func:`rate_names`), and the optimizer's groups.
    """
    rates = rate_names([scale_lr(rate, batch_size) for rate in learning_rates])
    classifiers: dict[str, LinearClassifier] = {}
    groups = []
    for n_blocks in n_last_blocks_list:
        for avgpool in (False, True):
            out_dim = create_linear_input(sample_output, n_blocks, avgpool).shape[1]
            for text, rate in rates.items():
                generator = generator_for(0, "linear", n_blocks, avgpool, rate)
                classifier = LinearClassifier(out_dim, n_blocks, avgpool, num_classes, generator=generator)
                classifiers[f"classifier_{n_blocks}_blocks_avgpool_{avgpool}_lr_{text}"] = classifier
                groups.append({"params": classifier.parameters(), "lr": rate})
    return AllClassifiers(classifiers).to(sample_output[0][0].device), groups


def rate_names(rates: Sequence[float]) -> dict[str, float]:
    """Return ``{text: rate}``: five decimals as upstream, more if two rates would share a name or round to zero.

    In upstream the later classifier replaces the earlier one then: of 13 rates, 10 are left at 8 images per step.
    """
    distinct = list(dict.fromkeys(rates))
    return {next(_texts(rate, distinct)).replace(".", "_"): rate for rate in distinct}


def _texts(rate: float, rates: Sequence[float]) -> Iterator[str]:
    for decimals in range(_MIN_DECIMALS, _MAX_DECIMALS):
        text = f"{rate:.{decimals}f}"
        is_close = decimals == _MIN_DECIMALS or math.isclose(float(text), rate, rel_tol=0.05)
        if is_close and sum(f"{other:.{decimals}f}" == text for other in rates) == 1 and (float(text) or not rate):
            yield text
    yield repr(rate)


def has_ddp_wrapper(m: nn.Module) -> bool:
    """Return whether ``m`` is wrapped for data parallelism."""
    return isinstance(m, nn.parallel.DistributedDataParallel)


def remove_ddp_wrapper(m: nn.Module) -> nn.Module:
    """Return the module inside a data-parallel wrapper, or ``m``."""
    return m.module if has_ddp_wrapper(m) else m


def sum_of_losses(logits: Mapping[str, Tensor], labels: Tensor) -> Tensor:
    """Return the sum over all classifiers of their mean cross-entropy; each one's gradient is that of its own loss."""
    return torch.stack([F.cross_entropy(one, labels) for one in logits.values()]).sum()


class LinearCheckpointer:
    """Save and restore classifiers, optimizer, schedule and iteration in ``folder``."""

    def __init__(self, model: nn.Module, folder: str | os.PathLike, optimizer: Any, scheduler: Any) -> None:
        self.model, self.folder, self.optimizer, self.scheduler = model, Path(folder), optimizer, scheduler

    def save(self, name: str, iteration: int) -> None:
        """Write ``<name>.pth`` on the main process, after ``iteration`` (0-based) and record it as the last."""
        if not distributed.is_main_process():
            return
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "iteration": iteration,
        }
        try:
            save_atomically(state, self.folder / f"{name}.pth")
            write_text(self.folder / "last_checkpoint", f"{name}.pth")
        except OSError as e:
            raise CheckpointError(
                f"expected to write {name}.pth in {self.folder}, got {e.strerror or e}; {remedy(str(e))}, then the "
                "same command resumes from the previous checkpoint"
            ) from e

    def resume_or_load(self, path: str | None, *, resume: bool) -> int:
        """Restore everything from the folder's last file if ``resume``, else the classifiers from ``path``.

        Returns:
            The last iteration before the file was written, -1 without a file.

        Raises:
            CheckpointError: the file cannot be read, or is for other classifiers.
        """
        last = last_checkpoint(self.folder) if resume else ""
        resume = bool(last)
        source = self.folder / last if last else path
        if not source:
            return -1
        state = read_weights(source)
        if not isinstance(state, Mapping) or "model" not in state or (resume and "scheduler" not in state):
            raise CheckpointError(
                f"expected a checkpoint of linear classifiers, got another file: {source}; give another"
            )
        try:
            self._check(state["model"], source)
            self.model.load_state_dict(state["model"])
            if resume:
                self.optimizer.load_state_dict(state["optimizer"])
                self.scheduler.load_state_dict(state["scheduler"])
            if (iteration := state.get("iteration", -1)) != -1:
                check_whole(state, "iteration", 0, 2**63)
        except (KeyError, ValueError, TypeError, AttributeError, RuntimeError) as e:
            advice = "start over with --no-resume" if resume else "give another --classifier-fpath"
            raise CheckpointError(
                f"expected a checkpoint of linear classifiers at {source}, got one with {type(e).__name__}: {e}; "
                f"{advice}"
            ) from e
        logger.info(f"classifiers from={source} iteration={iteration}")
        return iteration

    def _check(self, state: Mapping[str, Any], source: str | os.PathLike) -> None:
        own = {name: tuple(tensor.shape) for name, tensor in self.model.state_dict().items()}
        got = {name: tuple(tensor.shape) for name, tensor in state.items()}
        differences = [
            f"{name}: expected {own.get(name, 'nothing')}, got {got.get(name, 'nothing')}"
            for name in {**own, **got}
            if own.get(name) != got.get(name)
        ]
        if differences:
            shown = "\n  ".join(differences[:4])
            raise CheckpointError(
                f"{source}: the checkpoint is of other classifiers, {len(differences)} tensors differ:\n  {shown}\n"
                "use the same --learning-rates, --batch-size, number of processes and classes; or another --output-dir "
                "or --no-resume"
            )


def evaluate_linear_classifiers(
    feature_model: nn.Module,
    linear_classifiers: nn.Module,
    data_loader: Iterable[tuple[Tensor, Any]],
    metric_type: MetricType,
    metrics_file_path: str | Path,
    training_num_classes: int,
    iteration: int,
    prefixstring: str = "",
    class_mapping: Sequence[int] | None = None,
    best_classifier_on_val: str | None = None,
) -> dict[str, dict[str, Any]]:
    """Score all classifiers; return ``{"best_classifier": {"name": ..., "accuracy": 0..1}}``, also added to the file.

    Args:
        best_classifier_on_val: report this classifier instead of selecting the best.
    """
    num_classes = training_num_classes if class_mapping is None else len(class_mapping)
    classifiers = remove_ddp_wrapper(linear_classifiers).classifiers_dict
    if best_classifier_on_val is not None:
        classifiers = {best_classifier_on_val: classifiers[best_classifier_on_val]}
    _, scores = evaluate(
        feature_model,
        data_loader,
        {name: LinearPostprocessor(classifier, class_mapping) for name, classifier in classifiers.items()},
        {name: build_metric(metric_type, num_classes=num_classes) for name in classifiers},
        next(linear_classifiers.parameters()).device,
    )
    accuracies = {}
    for name, score in scores.items():
        top1, top5 = (float(score[key].mean()) for key in ("top-1", "top-5"))  # average over classes
        accuracies[name] = top1
        logger.info(f"{prefixstring} classifier={name} top1={top1:.2%} top5={top5:.2%}")
    best = max(accuracies, key=accuracies.get)
    results = {"best_classifier": {"name": best, "accuracy": accuracies[best]}}
    logger.info(f"{prefixstring} best classifier={best} top1={accuracies[best]:.2%}")
    if metrics_file_path:
        lines = [f"iter: {iteration}", *(json.dumps({key: value}) for key, value in results.items()), ""]
        append_lines(Path(metrics_file_path), lines)
    return results


def make_eval_data_loader(
    test_dataset_str: str,
    batch_size: int,
    num_workers: int,
    metric_type: MetricType,
    *,
    transform: Callable | None = None,
    train_dataset: Any = None,
    has_mapping: bool = False,
    flag: str = "--val-dataset",
    reading: Reading | None = None,
) -> ImageLoader:
    """Return a loader that yields every image once over all ranks.

    Args:
        transform: None for shorter side 256, central 224 pixels, ImageNet's normalisation.
        train_dataset: its class indices are used if both have a folder for each class, unless ``has_mapping``.
        flag: the flag that gave ``test_dataset_str``, for error messages.
        reading: of images of more than 8 bits; None to measure it.
    """
    dataset = open_labelled(flag, test_dataset_str, transform or make_classification_eval_transform(), reading)
    if train_dataset is not None:
        warn_of_same_files(train_dataset, dataset, "--train-dataset", flag)
    if train_dataset is not None and not has_mapping:
        dataset = match_classes(train_dataset, dataset, "--train-dataset", flag)
    collate = _pad if metric_type is MetricType.IMAGENET_REAL_ACCURACY else default_collate
    return every_image_once(dataset, batch_size, num_workers, collate)


def _pad(targets: Sequence[Any]) -> Tensor:
    """Return the true labels (one or several) of each image as int64 (B, most labels), padded with -1."""
    labels = [np.atleast_1d(np.asarray(target, dtype=np.int64)) for target in targets]
    padded = np.full((len(labels), max(1, *map(len, labels))), -1)
    for row, own in zip(padded, labels, strict=True):
        row[: len(own)] = own
    return torch.from_numpy(padded)


def test_on_datasets(
    feature_model: nn.Module,
    linear_classifiers: nn.Module,
    test_dataset_strs: Sequence[str],
    batch_size: int,
    num_workers: int,
    test_metric_types: Sequence[MetricType],
    metrics_file_path: str | Path,
    training_num_classes: int,
    iteration: int,
    best_classifier_on_val: str,
    prefixstring: str = "",
    test_class_mappings: Sequence[Sequence[int] | None] = (None,),
    *,
    transform: Callable | None = None,
    train_dataset: Any = None,
    reading: Reading | None = None,
) -> dict[str, float]:
    """Score one classifier on each dataset; return ``{"<dataset string>_accuracy": percent}``."""
    results = {}
    for text, mapping, metric_type in zip(test_dataset_strs, test_class_mappings, test_metric_types, strict=True):
        logger.info(f"test dataset: {text}")
        shared = {"train_dataset": train_dataset, "has_mapping": mapping is not None, "reading": reading}
        options = {"transform": transform, "flag": "--test-datasets", **shared}
        loader = make_eval_data_loader(text, batch_size, num_workers, metric_type, **options)
        best = evaluate_linear_classifiers(
            feature_model,
            linear_classifiers,
            loader,
            metric_type,
            metrics_file_path,
            training_num_classes,
            iteration,
            prefixstring,
            mapping,
            best_classifier_on_val,
        )
        results[f"{text}_accuracy"] = 100.0 * best["best_classifier"]["accuracy"]
    return results


test_on_datasets.__test__ = False  # upstream's name, not a test


def read_class_mapping(flag: str, path: str | None) -> np.ndarray | None:
    """Return the integers of an ``.npy`` file; None without a path.

    Raises:
        ConfigError: not such a file.
    """
    if not path or path == "None":
        return None
    try:
        mapping = np.load(Path(path).expanduser(), allow_pickle=False)
    except (OSError, ValueError) as e:
        raise ConfigError(f"{flag}: expected an .npy file of class indices, got {e} at {path}") from e
    if mapping.ndim != 1 or mapping.dtype.kind not in "iu":
        raise ConfigError(f"{flag}: expected a list of integers, got {mapping.dtype} {mapping.shape} in {path}")
    return mapping


def plan_tests(
    val_dataset: str,
    datasets: Sequence[str] | None,
    val_type: MetricType,
    types: Sequence[MetricType] | None,
    mapping_files: Sequence[str | None],
) -> tuple[list[str], list[MetricType], list]:
    """Return test datasets, their metrics and class mappings, all of the same length.

    Raises:
        ConfigError: the lists have different lengths, or a class mapping cannot be read.
    """
    tests = list(datasets or [val_dataset])
    types = list(types or [val_type] * len(tests))
    files = list(mapping_files)
    if not any(files):
        files = [None] * len(tests)
    if not len(tests) == len(types) == len(files):
        raise ConfigError(
            f"--test-datasets: expected a metric and a class mapping for each or none at all, got {len(tests)}, "
            f"{len(types)} --test-metric-types, {len(files)} --test-class-mapping-fpaths; None stands for no mapping"
        )
    return tests, types, [read_class_mapping("--test-class-mapping-fpaths", file) for file in files]


def eval_linear(
    *,
    feature_model: nn.Module,
    linear_classifiers: nn.Module,
    train_data_loader: Iterable,
    val_data_loader: Iterable,
    metrics_file_path: str | Path,
    optimizer: torch.optim.Optimizer,
    scheduler: Any,
    output_dir: str | Path,
    max_iter: int,
    checkpoint_period: int,
    running_checkpoint_period: int,
    eval_period: int,
    metric_type: MetricType,
    training_num_classes: int,
    resume: bool = True,
    classifier_fpath: str | None = None,
    val_class_mapping: Sequence[int] | None = None,
) -> tuple[dict[str, dict[str, Any]], nn.Module, nn.Module, int]:
    """Train until ``max_iter`` and evaluate; return (scores, feature model, classifiers, last iteration).

    ``train_data_loader`` must start where the checkpoint in ``output_dir`` ended. Periods are in iterations.
    """
    checkpointer = LinearCheckpointer(linear_classifiers, output_dir, optimizer, scheduler)
    iteration = start = checkpointer.resume_or_load(classifier_fpath, resume=resume) + 1
    device = next(linear_classifiers.parameters()).device
    reducer = GradientReducer(linear_classifiers.named_parameters())
    score = partial(
        evaluate_linear_classifiers,
        feature_model,
        linear_classifiers,
        val_data_loader,
        metric_type,
        metrics_file_path,
        training_num_classes,
        class_mapping=val_class_mapping,
    )
    metrics = MetricLogger(delimiter="  ")
    for images, labels in metrics.log_every(train_data_loader, 10, "Training", max_iter, start):
        images, labels = to_device(images, device), to_device(labels, device)
        loss = sum_of_losses(linear_classifiers(feature_model(images)), labels)
        optimizer.zero_grad(set_to_none=True)
        reducer.arm()
        loss.backward()
        reducer.finish()
        optimizer.step()
        scheduler.step()
        metrics.update(loss=loss, lr=optimizer.param_groups[0]["lr"])

        done = iteration + 1
        if done % running_checkpoint_period == 0:
            checkpointer.save(RUNNING_CHECKPOINT, iteration)
        if done % checkpoint_period == 0:
            checkpointer.save(f"model_{iteration:07d}", iteration)
        if done == max_iter:
            checkpointer.save("model_final", iteration)
        elif eval_period > 0 and done % eval_period == 0:
            score(iteration, f"iteration {iteration}:")
        iteration = done
    return score(iteration, "at the end:"), feature_model, linear_classifiers, iteration


def run_eval_linear(
    model: nn.Module,
    output_dir: str | Path,
    train_dataset_str: str,
    val_dataset_str: str,
    batch_size: int,
    epochs: int,
    epoch_length: int,
    num_workers: int,
    save_checkpoint_frequency: int,
    eval_period_iterations: int,
    learning_rates: Sequence[float],
    autocast_dtype: torch.dtype,
    test_dataset_strs: Sequence[str] | None = None,
    resume: bool = True,
    classifier_fpath: str | None = None,
    val_class_mapping_fpath: str | None = None,
    test_class_mapping_fpaths: Sequence[str | None] = (None,),
    val_metric_type: MetricType = MetricType.MEAN_ACCURACY,
    test_metric_types: Sequence[MetricType] | None = None,
    *,
    train_transform: Callable | None = None,
    eval_transform: Callable | None = None,
    reading: Reading | None = None,
) -> dict[str, Any]:
    """Train and score linear classifiers on ``model``; all output goes to ``output_dir``.

    Args:
        batch_size: images per step on each rank. epoch_length: iterations. save_checkpoint_frequency: epochs.
        learning_rates: for 256 images per step.
        test_dataset_strs: datasets on which the best classifier on ``val_dataset_str`` is also scored, each with its
            entry of ``test_metric_types`` and ``test_class_mapping_fpaths``.
        train_transform, eval_transform: None for upstream's, 224 pixels with ImageNet's normalisation.
        reading: of images of more than 8 bits, as in the model's training; None to measure it.

    Returns:
        ``{"best_classifier": name, "<dataset string>_accuracy": percent, ...}``.
    """
    tests, types, mappings = plan_tests(
        val_dataset_str, test_dataset_strs, val_metric_type, test_metric_types, test_class_mapping_fpaths
    )
    val_mapping = read_class_mapping("--val-class-mapping-fpath", val_class_mapping_fpath)
    train_dataset = open_labelled("--train-dataset", train_dataset_str, reading=reading)
    num_classes = num_classes_of(train_dataset)
    logger.info(f"dataset: {train_dataset_str} images={len(train_dataset)} classes={num_classes}")
    shared = {"transform": eval_transform, "train_dataset": train_dataset, "has_mapping": val_mapping is not None}
    shared["reading"] = train_dataset.reading
    val_loader = make_eval_data_loader(val_dataset_str, batch_size, num_workers, val_metric_type, **shared)
    open_log("dinov2")

    device = next(model.parameters()).device
    feature_model = ModelWithIntermediateLayers(model, max(N_LAST_BLOCKS), partial(autocast, device, autocast_dtype))
    draws = partial(draws_for_training, train_dataset, train_transform or make_classification_train_transform(), _SEED)
    sample = next(iter(draws(1, num_workers=0)))[0]
    classifiers, groups = setup_linear_classifiers(
        feature_model(sample.to(device)), N_LAST_BLOCKS, learning_rates, batch_size, num_classes
    )
    optimizer = torch.optim.SGD(groups, momentum=0.9, weight_decay=0)
    max_iter = epochs * epoch_length
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max_iter, eta_min=0)
    checkpointer = LinearCheckpointer(classifiers, output_dir, optimizer, scheduler)
    start = checkpointer.resume_or_load(classifier_fpath, resume=resume) + 1
    val_results, *_, iteration = eval_linear(
        feature_model=feature_model,
        linear_classifiers=classifiers,
        train_data_loader=draws(batch_size, num_workers=num_workers, start_iteration=start),
        val_data_loader=val_loader,
        metrics_file_path=Path(output_dir) / METRICS_FILE,
        optimizer=optimizer,
        scheduler=scheduler,
        output_dir=output_dir,
        max_iter=max_iter,
        checkpoint_period=save_checkpoint_frequency * epoch_length,
        running_checkpoint_period=epoch_length,
        eval_period=eval_period_iterations,
        metric_type=val_metric_type,
        training_num_classes=num_classes,
        resume=resume,
        classifier_fpath=classifier_fpath,
        val_class_mapping=val_mapping,
    )
    best = val_results["best_classifier"]
    results: dict[str, Any] = {}
    if tests != [val_dataset_str]:
        results = test_on_datasets(
            feature_model,
            classifiers,
            tests,
            batch_size,
            num_workers,
            types,
            Path(output_dir) / METRICS_FILE,
            num_classes,
            iteration,
            best["name"],
            "test:",
            mappings,
            transform=eval_transform,
            train_dataset=train_dataset,
            reading=train_dataset.reading,
        )
    results |= {"best_classifier": best["name"], f"{val_dataset_str}_accuracy": 100.0 * best["accuracy"]}
    logger.info("linear evaluation: " + " ".join(f"{key}={value}" for key, value in results.items()))
    return results


@evaluation
def main(args: argparse.Namespace) -> int:
    """Run the evaluation that ``args`` (:func:`get_args_parser`) describe; return the exit code."""
    names = ("epochs", "epoch_length", "batch_size", "save_checkpoint_frequency", "crop_size", "resize_size")
    check_positive(args, *names, "learning_rates")
    model, autocast_dtype = setup_and_build_model(args, hold_log=True)
    choose_sizes(args, model)
    run_eval_linear(
        model=model,
        output_dir=args.output_dir,
        train_dataset_str=args.train_dataset_str,
        val_dataset_str=args.val_dataset_str,
        test_dataset_strs=args.test_dataset_strs,
        batch_size=args.batch_size,
        epochs=args.epochs,
        epoch_length=args.epoch_length,
        num_workers=args.num_workers,
        save_checkpoint_frequency=args.save_checkpoint_frequency,
        eval_period_iterations=args.eval_period_iterations,
        learning_rates=args.learning_rates,
        autocast_dtype=autocast_dtype,
        resume=not args.no_resume,
        classifier_fpath=args.classifier_fpath,
        val_metric_type=MetricType(args.val_metric_type),
        test_metric_types=[MetricType(name) for name in args.test_metric_types or ()] or None,
        val_class_mapping_fpath=args.val_class_mapping_fpath,
        test_class_mapping_fpaths=args.test_class_mapping_fpaths,
        train_transform=make_classification_train_transform(crop_size=args.crop_size, **args.normalize),
        eval_transform=make_classification_eval_transform(
            resize_size=args.resize_size, crop_size=args.crop_size, **args.normalize
        ),
        reading=args.reading,
    )
    return 0


if __name__ == "__main__":
    entry.leave(entry.run("dinov2_custom.eval.linear", get_args_parser().parse_args(), quiet_threads=True))
