"""Train a decoder with the Trainer of transformers; validate after each epoch; keep ``best`` and ``last``."""

from __future__ import annotations

import argparse
import json
import logging
import math
import re
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from submitit.core.utils import environment_variables
from torch import Tensor, nn

from dinov2_custom import cli, distributed
from dinov2_custom.configs.paths import check_output_dir
from dinov2_custom.decoder import bridge
from dinov2_custom.decoder.bridge import Decoder, Facts, build
from dinov2_custom.decoder.evaluate import headline, predict_split, score, to_coco
from dinov2_custom.decoder.images import Images, collate
from dinov2_custom.decoder.instances import Split, semantic_mask
from dinov2_custom.decoder.labels import read_train_and_val
from dinov2_custom.decoder.losses import count, cross_entropy, set_loss
from dinov2_custom.decoder.measures import confusion, paired_interval
from dinov2_custom.decoder.settings import Settings, read_settings
from dinov2_custom.errors import ConfigError, optional
from dinov2_custom.export.rf_detr_folder import backbone_of, need_rf_detr, read_model
from dinov2_custom.export.write import replacing
from dinov2_custom.files import parse_json_object, write_text
from dinov2_custom.logging import METRICS_FILE, Sinks, open_log, setup_logging, truncate_after
from dinov2_custom.logging.sinks import JsonLines
from dinov2_custom.logging.wandb_sink import open_wandb
from dinov2_custom.teacher import Teacher, load_teacher
from dinov2_custom.train.run_directory import made_and_locked
from dinov2_custom.utils.weights import RELEASED_URL

logger = logging.getLogger("dinov2")
SETTINGS_FILE = "decoder_settings.json"
CHECKPOINTS = "checkpoints"
REPORT_FILE = "comparison.json"
_NAMES = {"detection": ("AP50", "bbox"), "instance": ("AP50 of masks", "segm"), "semantic": ("mIoU", "semantic")}
_ROWS_PER_EPOCH = 10
_RELEASED = re.compile(r"(dinov2_vit[sblg]14)(_reg4?)?")
_FREE = ("num_workers", "wandb")  # keys that may change when a run is continued


def main(args: argparse.Namespace) -> int:
    """Run the command line parsed by ``cli.decoder_train_parser``; return the exit code."""
    settings = read_settings(args.opts)
    bridge.choose_head(args.task, settings.head)
    need_rf_detr("training a decoder")
    for name in ("accelerate", "pycocotools", "scipy"):
        optional(name, "training a decoder")
    folder = Path(args.output_dir).expanduser()
    check_output_dir(folder, "--output-dir")
    with distributed.enabled():
        if settings.precision == "fp16" and distributed.get_device().type == "cpu":
            raise ConfigError("precision: expected fp32 or bf16 on a CPU, got fp16, which needs a GPU")
        setup_logging(folder, name="dinov2", level=logging.INFO, hold=True)
        train, val = read_train_and_val(args.train, args.val, args.task)
        with made_and_locked(folder) if distributed.is_main_process() else nullcontext():
            _run(args, args.backbone, folder, settings, train, val)
            if args.compare_to:
                other = folder / "compared_to"
                _run(args, args.compare_to, other, _other(settings, folder), train, val, start_from=args.backbone)
                if distributed.is_main_process():
                    print(report(folder, other, val, len(train.images))["sentence"])
    return 0


def _other(settings: Settings, folder: Path) -> Settings:
    """Return the settings of the run that is compared: those of the first, as another run of W&B."""
    name = f"{settings.wandb.name or folder.resolve().name}, compared to"
    return settings.model_copy(update={"wandb": settings.wandb.model_copy(update={"id": "", "name": name})})


def load_backbone(source: str) -> Teacher:
    """Return the backbone of a run, weight file, Hugging Face folder or released name such as dinov2_vitb14."""
    if name := _RELEASED.fullmatch(source):
        source = f"{RELEASED_URL}/{name[1]}/{name[1]}{'_reg4' if name[2] else ''}_pretrain.pth"
    return load_teacher(source)


def _run(
    args: argparse.Namespace,
    source: str,
    folder: Path,
    settings: Settings,
    train: Split,
    val: Split,
    start_from: str = "",
) -> dict[str, Any]:
    """Train the decoder of one backbone; ``source`` may be ``random`` for the architecture of ``start_from``."""
    teacher = load_backbone(start_from if source == "random" else source)
    decoder = build(teacher, args.task, train.classes, settings, random_backbone=source == "random")
    _check_batch(decoder, settings, train)
    if distributed.is_main_process():
        _describe(args, source, folder, settings)
    distributed.barrier()
    open_log("dinov2")
    return fit(decoder, train, val, folder, settings)


def _check_batch(decoder: Decoder, settings: Settings, train: Split) -> None:
    if decoder.facts.task == "semantic" and min(settings.batch, len(train.images)) < 2:
        raise ConfigError(
            f"batch: expected at least 2 images for batch normalisation, got batch={settings.batch} and "
            f"{len(train.images)} training images; raise it, or add images"
        )


def _describe(args: argparse.Namespace, source: str, folder: Path, settings: Settings) -> None:
    """Write the settings of a new run, or compare them with those of the run that is continued."""
    now = {"backbone": source, "task": args.task, "train": args.train, "val": args.val}
    now["processes"] = distributed.get_global_size()
    now |= json.loads(settings.model_dump_json(exclude=set(_FREE)))
    file = folder / SETTINGS_FILE
    try:
        before = parse_json_object(file.read_bytes())
    except (OSError, ValueError):
        before = now
    if changed := [key for key in now if now[key] != before.get(key)]:
        lines = "; ".join(f"{key}: {before.get(key)!r} before, {now[key]!r} now" for key in changed)
        raise ConfigError(f"expected the settings of the run in {folder}, got {lines}; choose another --output-dir")
    folder.mkdir(parents=True, exist_ok=True)
    write_text(file, json.dumps(now, indent=2) + "\n")


def parameter_groups(model: nn.Module, settings: Settings) -> list[dict[str, Any]]:
    """Return AdamW's groups: ``lr * layer_decay ** k`` for the k-th block from the end, 0 for the decoder.

    The embeddings count as a block before the first one. The mask token, which is not used, is not trained. Vectors,
    positions and queries have no weight decay.
    """
    backbone = backbone_of(model)
    depth = len(backbone.encoder.layer)
    distances = {id(value): 0 for value in model.parameters()}
    distances |= {id(value): depth + 1 for value in backbone.embeddings.parameters()}
    for index, layer in enumerate(backbone.encoder.layer):
        distances |= {id(value): depth - index for value in layer.parameters()}
    if settings.frozen:
        backbone.requires_grad_(False)
    if getattr(backbone.embeddings, "mask_token", None) is not None:
        backbone.embeddings.mask_token.requires_grad_(False)
    groups: dict[tuple[int, bool], list[nn.Parameter]] = {}
    for name, value in model.named_parameters():
        if value.requires_grad:
            plain = value.ndim < 2 or "embeddings." in name or "reference_point" in name or "query_feat" in name
            groups.setdefault((distances[id(value)], plain), []).append(value)
    return [
        {
            "params": values,
            "lr": settings.lr * settings.layer_decay**distance,
            "weight_decay": 0.0 if plain else settings.weight_decay,
        }
        for (distance, plain), values in sorted(groups.items(), key=lambda item: item[0])
    ]


def learning_rate_factor(step: int, num_steps: int, warmup_steps: int) -> float:
    """Return the factor of ``step`` in 0..num_steps - 1: linear warm-up, and a tenth from 11/12 of the run."""
    warm = min(1.0, (step + 1) / (warmup_steps + 1))
    return warm * (0.1 if step >= num_steps * 11 // 12 else 1.0)


def newest_checkpoint(folder: Path) -> str | None:
    """Return the newest whole checkpoint; a torn one lacks the state, which is written last."""
    found = [path.parent for path in folder.glob("checkpoint-*/trainer_state.json")]
    return str(max(found, key=lambda path: int(path.name.partition("-")[2]))) if found else None


def fit(
    decoder: Decoder,
    train: Split,
    val: Split,
    folder: Path,
    settings: Settings,
    callbacks: Sequence[Any] = (),
) -> dict[str, Any]:
    """Train ``decoder`` in ``folder`` and return the scores of the best epoch.

    The newest checkpoint in ``folder`` is continued, with the same result as without the interruption.
    """
    from transformers import Trainer, TrainerCallback

    facts = decoder.facts
    if facts.task != "semantic":
        set_loss(decoder.model, settings.label_smoothing)
    data = Images(train, facts, settings)
    drop_last = len(data) >= settings.batch * distributed.get_global_size()
    batches = len(data) / (settings.batch * distributed.get_global_size())
    steps_per_epoch = math.ceil((math.floor(batches) if drop_last else math.ceil(batches)) / settings.accumulation)
    num_steps = steps_per_epoch * settings.epochs
    images_per_step = settings.batch * distributed.get_global_size() * settings.accumulation

    def sum_of_losses(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        if facts.task == "semantic":
            logits = model(pixel_values=inputs["pixel_values"]).logits
            return cross_entropy(logits, inputs["labels"], settings.label_smoothing)
        return model(**inputs).loss

    class DecoderTrainer(Trainer):
        """A Trainer whose loss is the mean over the objects or pixels of a step, and whose validation is AP or mIoU."""

        loss_is_scaled_for_ga = True

        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            return sum_of_losses(model, inputs) / num_items_in_batch

        def get_batch_samples(self, epoch_iterator, num_batches, device):
            batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
            number = torch.tensor(float(sum(count(batch["labels"]) for batch in batches)), device=device)
            # gradients are averaged over processes
            return batches, distributed.all_reduce(number, average=True).clamp_min(1 / distributed.get_global_size())

        def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
            # the Trainer's own compares names with those in the file, which transformers renames when it saves: it
            # would leave the attention of the backbone as it is, with a warning
            self.model.load_state_dict(read_model(type(self.model), resume_from_checkpoint).state_dict())

        def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
            scores = score(decoder._replace(model=self.model), val, settings.batch, self.args.device, sum_of_losses)
            if distributed.is_main_process():
                keep(decoder._replace(model=self.model), scores, self.state.global_step - 1, folder)
            distributed.barrier()
            metrics = {f"eval_{name}": value for name, value in scores.items() if isinstance(value, float)}
            self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
            return metrics

    class Epochs(TrainerCallback):
        """Give the images the epoch, which accelerate does in a single process only."""

        def on_epoch_begin(self, args, state, control, **kwargs):
            data.set_epoch(round(state.epoch or 0))

    class Rows(TrainerCallback):
        """Send a row of metrics for an iteration, from 0, to ``sinks``; the row of a validation repeats it."""

        def __init__(self) -> None:
            self.row: dict[str, float] = {}
            self.step, self.since = 0, 0.0

        def on_step_begin(self, args, state, control, **kwargs):
            if not self.since:
                self.step, self.since = state.global_step, time.monotonic()

        def on_log(self, args, state, control, logs=None, **kwargs):
            if logs and "loss" in logs:
                names = {"loss": "total_loss", "learning_rate": "lr", "grad_norm": "grad_norm"}
                values = {new: float(logs[old]) for old, new in names.items() if old in logs}
                seconds, self.since = (time.monotonic() - self.since) / (state.global_step - self.step), 0.0
                self._write(state, values | {"iter_time": seconds, "images_per_s": images_per_step / seconds})

        def on_evaluate(self, args, state, control, metrics=None, **kwargs):
            values = {f"val_{name.removeprefix('eval_')}": value for name, value in (metrics or {}).items()}
            self._write(state, self.row | values)
            self.since = 0.0

        def _write(self, state: Any, values: dict[str, float]) -> None:
            self.row = {name: value for name, value in values.items() if not name.startswith("val_")}
            iteration = state.global_step - 1
            sinks.log(iteration, {"iteration": iteration, "epoch": float(state.epoch or 0)} | values)

    optimizer = torch.optim.AdamW(parameter_groups(decoder.model, settings))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: learning_rate_factor(step, num_steps, settings.warmup_steps)
    )
    trainer = DecoderTrainer(
        model=decoder.model,
        args=training_arguments(
            settings,
            output_dir=str(folder / CHECKPOINTS),
            logging_steps=max(steps_per_epoch // _ROWS_PER_EPOCH, 1),
            dataloader_drop_last=drop_last,
        ),
        train_dataset=data,
        eval_dataset=Images(val, facts),
        data_collator=collate,
        optimizers=(optimizer, schedule),
        callbacks=[Epochs(), Rows(), *callbacks],
    )
    newest = newest_checkpoint(folder / CHECKPOINTS)
    with open_sinks(folder, settings, 0 if newest is None else int(newest.rpartition("-")[2])) as sinks:
        # otherwise accelerate takes the rank on the node for the number of the GPU, which a task may not see
        with environment_variables(ACCELERATE_BYPASS_DEVICE_MAP="true"):
            trainer.train(resume_from_checkpoint=newest)
    return read_scores(folder / "best")


def training_arguments(settings: Settings, **more: Any) -> Any:
    """Return transformers' arguments for ``settings``, and ``more`` of them, to train on this process's device."""
    from transformers import TrainingArguments

    device = distributed.get_device()
    arguments = TrainingArguments(
        per_device_train_batch_size=settings.batch,
        gradient_accumulation_steps=settings.accumulation,
        num_train_epochs=settings.epochs,
        max_grad_norm=settings.clip_grad,
        bf16=settings.precision == "bf16",
        fp16=settings.precision == "fp16",
        seed=settings.seed,
        eval_strategy="epoch",
        save_strategy="epoch",
        save_total_limit=1,
        report_to="none",
        remove_unused_columns=False,
        label_names=["labels"],
        dataloader_num_workers=settings.num_workers,
        dataloader_pin_memory=device.type == "cuda",
        ddp_find_unused_parameters=False,
        use_cpu=device.type == "cpu",
        **more,
    )
    # otherwise a single process trains on all GPUs that it sees, with nn.DataParallel and a batch for each
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments


def open_sinks(folder: Path, settings: Settings, first_step: int) -> Sinks:
    """Open the file of metrics and W&B on the main process; drop rows from ``first_step`` on of an earlier start."""
    if not distributed.is_main_process():
        return Sinks()
    truncate_after(folder / METRICS_FILE, first_step)
    wandb = open_wandb(settings.wandb.model_dump(), folder / "logs", settings.model_dump(), folder.resolve().name)
    return Sinks([JsonLines(folder / METRICS_FILE), *filter(None, [wandb])])


def keep(decoder: Decoder, scores: dict[str, Any], step: int, folder: Path) -> None:
    """Write ``last``, and ``best`` if no earlier epoch scored higher, or as high with a lower loss."""
    name, value = headline(decoder.facts.task, scores)
    earlier = read_scores(folder / "best") if (folder / "best").is_dir() else {}
    targets = ["last"]
    before = (headline(decoder.facts.task, earlier)[1], -earlier["loss"]) if earlier else ()
    if not earlier or earlier["iteration"] >= step or (value, -scores["loss"]) > before:
        targets.append("best")
    for target in targets:
        with replacing(folder / target, overwrite=True, folder=True) as written:
            bridge.save(decoder, written)
            (written / "scores.json").write_text(json.dumps({"iteration": step} | scores, indent=2) + "\n")
    said = f"{name} {value:.3f}, validation loss {scores['loss']:.3f}"
    logger.info(f"iteration {step}: {said}; wrote {' and '.join(targets)}")


def read_scores(folder: Path) -> dict[str, Any]:
    """Return the scores that :func:`keep` wrote beside a decoder."""
    return parse_json_object((folder / "scores.json").read_bytes())


def report(folder: Path, other: Path, split: Split, num_labelled: int) -> dict[str, Any]:
    """Compare the best decoders in two folders on ``split``; write and return the report with its ``sentence``.

    The interval is that of a paired bootstrap: images are drawn with replacement, the same for both.
    """
    predictions = []
    for place in (folder, other):
        decoder = bridge.load(place)
        device = distributed.get_device()
        found, _ = predict_split(decoder._replace(model=decoder.model.to(device)), split, 8, device, alone=True)
        predictions.append(_scorable(decoder.facts, split, found))
    label, kind = _NAMES[decoder.facts.task]
    change, low, high = paired_interval(split, *predictions, kind, seed=0)
    sentence = (
        f"{label} {_signed(change)}, 95 % interval {_signed(low)} to {_signed(high)}, {num_labelled} labelled images"
    )
    content = {"sentence": sentence, "difference": change, "low": low, "high": high, "images": len(split.images)}
    write_text(folder / REPORT_FILE, json.dumps(content, indent=2) + "\n")
    return content


def _scorable(facts: Facts, split: Split, predictions: list[Any]) -> list[Any]:
    """Return what ``paired_interval`` takes."""
    if facts.task != "semantic":
        return to_coco(predictions)
    num_classes = len(facts.classes)
    return [
        confusion(found, semantic_mask(image, num_classes), num_classes)
        for image, found in zip(split.images, predictions, strict=True)
    ]


def _signed(value: float) -> str:
    """Return ``+.07`` for 0.07."""
    return f"{value:+.2f}".replace("0.", ".", 1)


if __name__ == "__main__":
    cli.main("decode-train")
