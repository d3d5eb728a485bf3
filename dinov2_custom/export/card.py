"""Write the model card of an export: how the model was trained, what was measured, under which licence it started."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

from dinov2_custom import __version__
from dinov2_custom.errors import ConfigError, DataError
from dinov2_custom.export.portable import Portable
from dinov2_custom.files import parse_json_object
from dinov2_custom.plots.loss_curve import plot_loss_curve
from dinov2_custom.plots.metrics_file import Run, read_run
from dinov2_custom.teacher import Teacher, is_released
from dinov2_custom.utils.paths import without_credentials
from dinov2_custom.utils.run_folder import MARKER, last_checkpoint, run_config_near

CURVES = "curves.png"
_LIBRARIES = {"hf": "transformers", "timm": "timm", "rf-detr": "transformers"}
_RELEASED = re.compile(r"dinov2_vit[sblg]14(_reg4)?_(pretrain|linear\d?_head)\b|facebook[/\\]dinov2-")
_ROWS = {  # column of eval_<key>, start_<key> and pixels_<key>
    "knn": "kNN accuracy",
    "rankme": "RankMe",
    "uniformity": "uniformity",
    "alignment": "alignment",
    "loss": "loss of the evaluation",
    "cosine_to_start": "cosine to the start's features",
    "cka_to_start": "CKA with the start's features",
}
_USE = {
    "hf": 'model = transformers.AutoModel.from_pretrained("{name}")\n'
    'processor = transformers.AutoImageProcessor.from_pretrained("{name}")',
    "timm": 'model = timm.create_model("local-dir:{name}", pretrained=True)',
    "torch": 'state = torch.load("{name}", weights_only=True)  # of a DINOv2 ViT with block_chunks=0',
    "safetensors": 'state = safetensors.torch.load_file("{name}")  # of a DINOv2 ViT with block_chunks=0',
    "rf-detr": 'model = transformers.RfDetrForObjectDetection.from_pretrained(\n'
    '    "{name}", id2label={{0: "cell"}}, label2id={{"cell": 0}}, ignore_mismatched_sizes=True\n'
    ")  # your classes: their layers are new; train the model before use\n"
    'processor = transformers.AutoImageProcessor.from_pretrained("{name}")',
    "onnx": 'session = onnxruntime.InferenceSession("{name}")\n'
    'cls_token, patch_tokens = session.run(None, {{"image": images}})',
}

_MORE = {"rf-detr": " It is in an RF-DETR whose decoder and heads are randomly initialised: train it before use."}


def card_path(path: Path) -> Path:
    """Return the card's file: ``README.md`` in a folder, ``<file>.md`` beside a file."""
    return path / "README.md" if path.is_dir() else path.with_name(path.name + ".md")


def curves_path(path: Path) -> Path:
    """Return the picture's file: ``curves.png`` in a folder, ``<file>.png`` beside a file."""
    return path / CURVES if path.is_dir() else path.with_name(path.name + ".png")


def write_card(model: Portable, teacher: Teacher, form: str, path: Path) -> Path:
    """Write the card, and a picture of the loss if there are metrics and matplotlib, for the export at ``path``."""
    near = run_config_near(teacher.weights)
    # a configuration given by hand, or one of released weights, says nothing about the training
    is_run = near is not None and near == Path(teacher.config_file).absolute() and not is_released(str(near))
    folder = near.parent if is_run else None
    run = _run(folder, teacher.weights)
    picture = _draw(run, curves_path(path))
    text = card(model, teacher, form, path.name, run, _facts(folder), picture.name if picture else "")
    card_path(path).write_text(text, encoding="utf-8", errors="backslashreplace")
    return card_path(path)


def card(
    model: Portable,
    teacher: Teacher,
    form: str,
    name: str,
    run: Run | None = None,
    facts: Mapping[str, str] | None = None,
    picture: str = "",
) -> str:
    """Return the card as Markdown, with the metadata that the Hugging Face Hub reads at its top.

    Args:
        name: file or folder of the export.
        run: rows and configuration of the training; None if unknown.
        facts: ``images``, ``draws`` (images per iteration), ``command``, ``versions`` of the training, as far as known.
        picture: file of the loss curve.
    """
    facts = facts or {}
    start = str((run.setting("student.pretrained_weights") or run.setting("MODEL.WEIGHTS") or "") if run else "")
    licence, words = licence_of(start, teacher.weights, trained=run is not None)
    head = {
        "library_name": _LIBRARIES.get(form, "dinov2_custom"),
        "license": licence,
        "pipeline_tag": "object-detection" if form == "rf-detr" else "image-feature-extraction",
        "tags": ["dinov2", "self-supervised", "vision", *([form] if form == "onnx" else [])],
    }
    backbone = model.backbone
    sizes = {
        "architecture": f"ViT, {backbone.n_blocks} blocks of width {backbone.embed_dim}, {backbone.num_heads} heads, "
        f"patches of {backbone.patch_size} pixels, {backbone.num_register_tokens} registers",
        "parameters": f"{sum(value.numel() for value in model.state.values()):,}",
        "image size": f"{model.image_size} pixels",
        "normalization": f"mean {list(model.normalize['mean'])}, std {list(model.normalize['std'])}",
    }
    parts = [
        f"---\n{yaml.safe_dump(head, sort_keys=False)}---",
        f"# {name}",
        "A DINOv2 backbone, trained without labels with dinov2_custom." + _MORE.get(form, ""),
        f"```python\n{_USE[form].format(name=name)}\n```",
        "## Model",
        _table(("", ""), sizes.items()),
        "## Training",
        _table(("", ""), _training(run, facts, start).items()),
    ]
    if run and (measured := _measured(run.rows)):
        parts += ["## Metrics", measured]
    if picture:
        parts.append(f"![Training loss]({picture})")
    parts += ["## Licence", words]
    if command := facts.get("command"):
        parts += ["## Command", f"```\n{command}\n```"]
    parts += [
        "## Versions",
        facts.get("versions") or f"exported with dinov2_custom {__version__}, torch {torch.__version__}",
    ]
    return "\n\n".join(parts) + "\n"


def licence_of(start: str, weights: str, trained: bool) -> tuple[str, str]:
    """Return the Hub's name of the licence and a sentence, from the weights that the training started from.

    Args:
        start: ``student.pretrained_weights``; empty for none.
        weights: the exported file itself.
        trained: whether the training run is known.
    """
    source = start if trained else weights
    if source and _RELEASED.search(source):
        return "apache-2.0", "The weights start from Meta's released DINOv2 weights, which are under Apache-2.0."
    if source:
        shown = without_credentials(source)
        return "unknown", f"The training started from `{shown}`, whose licence is unknown." if trained else (
            f"The weights are those of `{shown}`; their licence is unknown."
        )
    return "unknown", "Trained from random weights. Whoever trained the model chooses its licence; none is set."


def _training(run: Run | None, facts: Mapping[str, str], start: str) -> dict[str, str]:
    if run is None:
        return {"run": "unknown: there is no run directory around the weights"}
    found = {
        "images": facts.get("images", "unknown"),
        "start": f"`{without_credentials(start)}`" if start else "random",
    }
    if run.rows:
        last = run.rows[-1]
        found["iterations"] = f"{last['iteration'] + 1:,}"
        passes = last.get("epoch")
        if passes is None and "draws" in facts:
            passes = float(facts["draws"]) * (last["iteration"] + 1) / max(int(facts["images"]), 1)
        found["passes over the images"] = "unknown" if passes is None else f"{passes:.4g}"
        if "total_loss" in last:
            found["last loss"] = f"{last['total_loss']:.4g}"
    for key in ("crops.global_crops_size", "crops.local_crops_size", "optim.base_lr", "dino.head_n_prototypes"):
        if (value := run.setting(key)) is not None:
            found[f"`{key}`"] = str(value)
    return found


def _measured(rows: Sequence[dict]) -> str:
    """Return a table of the last evaluation during training, next to its values before training; "" without one."""
    last = next((row for row in reversed(rows) if any(key.startswith("eval_") for key in row)), None)
    if last is None:
        return ""
    lines = []
    for key, label in _ROWS.items():
        values = [last.get(f"{when}_{key}") for when in ("eval", "start", "pixels")]
        if values[0] is not None:
            lines.append((label, *("" if value is None else f"{value:.4g}" for value in values)))
    return f"At iteration {last['iteration']:,}:\n\n" + _table(("", "trained", "before training", "raw pixels"), lines)


def _table(header: Sequence[str], rows: Any) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)


def _run(folder: Path | None, weights: str) -> Run | None:
    """Return the run with the rows up to the exported weights; rows may be missing."""
    if folder is None:
        return None
    try:
        run = read_run(folder, folder.resolve().name)
    except DataError:
        config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
        return Run(folder.resolve().name, [], config)
    match = re.search(r"_(\d+)$", Path(weights).parent.name)
    last = int(match[1]) if match else math.inf
    return run._replace(rows=[row for row in run.rows if row["iteration"] <= last])


def _facts(folder: Path | None) -> dict[str, str]:
    """Return what the run's checkpoint and log say; see :func:`card`."""
    if folder is None:
        return {}
    found = {}
    try:
        values = parse_json_object((folder / last_checkpoint(folder) / MARKER).read_bytes(), finite=False)
        found = {"images": str(values["data"]["images"]), "draws": str(values["draws"] / (values["iteration"] + 1))}
    except (OSError, ValueError, KeyError, TypeError):
        pass  # the checkpoint may have been deleted to save space
    try:
        log = (folder / "logs" / "log.txt").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return found
    for key in ("command", "versions"):
        if lines := re.findall(rf"\] {key}: (.*)", log):
            found[key] = lines[-1]
    return found


def _draw(run: Run | None, path: Path) -> Path | None:
    if run is None or not run.rows or "dino_global_crops_loss" not in run.rows[0]:
        return None
    try:
        return plot_loss_curve(run.rows, path, run.setting("dino.head_n_prototypes") or 2)
    except ConfigError:  # no matplotlib
        return None
