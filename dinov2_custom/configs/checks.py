"""Find all mistakes of a configuration beyond the type and range of single values, and raise them as one error.

These are unknown keys, malformed overrides, incompatible values and an indivisible global batch. Types and ranges are
in schema.py.
"""

import difflib
import math
import os
import re
from collections.abc import Callable, Iterator
from typing import Any

from dinov2_custom.configs.schema import DEPTH_OF_ARCH, Config, Section, all_keys, section_keys
from dinov2_custom.errors import ConfigError

# Common guesses of a key, and the actual key.
_OTHER_NAMES = {
    "lr": "optim.base_lr",
    "learning_rate": "optim.base_lr",
    "batch_size": "train.batch_size_per_gpu",
    "data_path": "train.dataset_path",
    "dataset": "train.dataset_path",
    "workers": "train.num_workers",
    "epoch_length": "train.OFFICIAL_EPOCH_LENGTH",
    "registers": "student.num_register_tokens",
    "use_torch_compile": "train.compile",
}
# Keys and sections of known forks that are not supported, and their replacements.
OF_FORKS = {
    "daino": "the supervised side loss of a fork, which this package does not have",
    "tune": "kNN during training of a fork: set evaluation.online.knn_train and evaluation.online.knn_val instead",
    "early_stopping": "stop when a score no longer rises, of a fork: not here",
    "optim.max_iter": "train.max_steps",
    "optim.warmup_pct": "optim.warmup_epochs with a share of the run, such as 10%",
    "optim.freeze_last_layer_pct": "optim.freeze_last_layer_epochs with a share of the run, such as 1%",
    "teacher.warmup_teacher_temp_pct": "teacher.warmup_teacher_temp_epochs with a share of the run, such as 30%",
    "train.save_every": "checkpointing.period, in iterations",
    "train.save_frequency": "checkpointing.period",
    "wandb.dir": "nothing: W&B's files are in the output directory's logs/wandb",
    "wandb.enable": "wandb.mode: online",
    "wandb.exp_name": "wandb.name",
    "wandb.resume_id": "wandb.id",
    "wandb.username": "wandb.entity",
}
GLOBAL, BATCH, ACCUMULATED = "optim.global_batch", "train.batch_size_per_gpu", "optim.accumulation_steps"
_RGB = 3
_RELEASED = re.compile(r"(?:dinov2_)?vit_?([sblg])(\d+)?(?:_reg(\d*))?")  # names of weights such as dinov2_vitb14_reg
_ARCH_OF_LETTER = {"s": "vit_small", "b": "vit_base", "l": "vit_large", "g": "vit_giant2"}

def of_fork(key: str) -> str:
    """Return the replacement of ``key``, or of a section that contains it, if it is a known fork's, else ""."""
    parts = key.split(".")
    return next((OF_FORKS[name] for n in range(len(parts), 0, -1) if (name := ".".join(parts[:n])) in OF_FORKS), "")


class Mistakes:
    """A list of mistakes with one final hint; it records their keys, so that no check uses an invalid value.

    Args:
        of: what has the mistakes.
    """

    def __init__(self, of: str = "the configuration") -> None:
        self.of = of
        self.lines: list[str] = []
        self.keys: set[str] = set()
        self.advice = ""

    def add(self, where: str, expected: str, got: str, fix: str = "", *, key: str = "") -> None:
        """Add one line: location (key and source), expected and actual value, and how to fix it."""
        advice = f" -> {fix}" if fix else ""
        self.lines.append(f"{where}: expected {expected}, got {got}{advice}")
        if key:
            self.keys.add(key)

    def raise_if_any(self) -> None:
        """Raise one ConfigError that lists all mistakes, if there are any."""
        if not self.lines:
            return
        count = "1 mistake" if len(self.lines) == 1 else f"{len(self.lines)} mistakes"
        lines = [f"{count} in {self.of}:", *(f"  - {line}" for line in self.lines), self.advice]
        raise ConfigError("\n".join(lines).rstrip())


def suggest_key(name: str, root: type[Section] = Config) -> str:
    """Suggest the known keys or sections most similar to an unknown dotted key, in any section, or "".

    For a key of a known fork, return its replacement in a run's configuration.
    """
    if root is Config and (replacement := of_fork(name)):
        return replacement
    used = [key for key, field in all_keys(root).items() if not field.json_schema_extra["unused"] and key != "optim.lr"]
    known = {key: key.rsplit(".", 1)[-1].lower() for key in [*used, *section_keys(root)]}
    leaf = name.rsplit(".", 1)[-1].lower()
    near = [key for key, its_leaf in known.items() if its_leaf == leaf]
    if not near and _OTHER_NAMES.get(leaf) in known:
        near = [_OTHER_NAMES[leaf]]
    near = near or difflib.get_close_matches(name, known, n=2, cutoff=0.8)
    if not near:
        by_leaf = {its_leaf: key for key, its_leaf in reversed(known.items())}
        near = [by_leaf[match] for match in difflib.get_close_matches(leaf, by_leaf, n=2, cutoff=0.65)]
    return f"did you mean {' or '.join(near[:3])}?" if near else ""


def explain_bad_override(text: str, root: type[Section] = Config) -> str:
    """Return how to fix an override that is not of the form key=value."""
    if text.endswith((".yaml", ".yml")):
        return f"for a config file write --config-file {text}"
    if text in all_keys(root):
        return f"write {text}=VALUE"
    if root is Config and os.path.exists(os.path.expanduser(text)):
        return f"for images write train.dataset_path={text}"
    if ":" in text and text.split(":", 1)[0] in all_keys(root):
        return "write = instead of the first colon"
    if text != text.strip("[]{},:"):
        return "a list or mapping with spaces needs quotes around the whole override: 'key=[a, b]'"
    return suggest_key(text, root).replace("?", "=VALUE?") or "write key=value, without spaces around ="


def check_combinations(
    values: dict[str, Any], where: Callable[[str], str], mistakes: Mistakes, *, training: bool = True
) -> None:
    """Report all incompatible values and, with ``training``, settings that cannot be trained.

    Args:
        values: value of each key by dotted name; invalid values are replaced by their defaults.
        where: names the source of a key's value, such as a file.
        mistakes: extended in place; keys already in it are skipped.
    """
    for holds, keys, expected, fix in [*_combinations(values), *(_for_training(values) if training else ())]:
        if holds or not mistakes.keys.isdisjoint(keys):
            continue
        first, *others = keys
        got = repr(values[first])
        if others:
            got += " with " + ", ".join(f"{key} = {values[key]!r} ({where(key)})" for key in others)
        mistakes.add(f"{first} ({where(first)})", expected, got, fix, key="" if others else first)


def _combinations(values: dict[str, Any]) -> Iterator[tuple[bool, list[str], str, str]]:
    """Yield each rule: whether it holds, the keys involved, the expected value of the first, and the fix."""

    def get(*keys: str) -> list[Any]:
        return [values[key] for key in keys]

    arch = plain_arch_name(values["student.arch"])
    yield (arch in DEPTH_OF_ARCH, ["student.arch"], f"one of {', '.join(DEPTH_OF_ARCH)}", _nearest_arch(arch))
    depth = DEPTH_OF_ARCH.get(arch, math.inf)
    yield (
        values["student.block_chunks"] <= depth,
        ["student.block_chunks", "student.arch"],
        f"at most the {depth} blocks of the network",
        "use 0 for no chunks",
    )
    patch = values["student.patch_size"]
    for key, number in (("crops.global_crops_size", []), ("crops.local_crops_size", ["crops.local_crops_number"])):
        size = values[key]
        multiples = [near for near in (size // patch * patch, (size // patch + 1) * patch) if near > 0]
        multiples.sort(key=lambda near, size=size: abs(near - size))
        yield (
            size % patch == 0 or get(*number) == [0],
            [key, "student.patch_size", *number],
            f"a multiple of the patch size {patch}",
            f"use {key}={' or '.join(map(str, multiples))}",
        )
    warmup, epochs = keys = ["optim.warmup_epochs", "optim.epochs"]
    yield (
        share_of_run(values[warmup], values[epochs]) <= 1,
        keys,
        "at most optim.epochs",
        f"set optim.warmup_epochs=10% (of the run) or {values[epochs] / 10:g}, or raise optim.epochs",
    )
    keys = ["train.max_steps", "train.max_hours"]
    yield (0 in get(*keys), keys, "0 when the other is set", "choose one of them for the length of the run")
    keys = ["dino.loss_weight", "ibot.loss_weight"]
    yield (any(get(*keys)), keys, "at least one of them above 0", "without both there is nothing to learn from")
    intensity = values["data.intensity"]
    yield (
        intensity == "auto" or intensity[0] < intensity[1],
        ["data.intensity"],
        "the smaller value first and the greater one second",
        "give the values that become black and white",
    )
    for name, default in (("in_chans", _RGB), ("channel_adaptive", False)):
        teachers, students = get(*(keys := [f"teacher.{name}", f"student.{name}"]))
        yield (
            teachers in (students, default),  # the default is allowed if a configuration sets only the student's
            keys,
            f"the student's, {students!r}",
            "the teacher follows the student's weights: set both or the student's alone",
        )
    for part in ("backbone", "dino_head", "ibot_head"):
        keys = [f"compute_precision.{side}.{part}.sharding_strategy" for side in ("teacher", "student")]
        yield (
            "auto" in get(*keys) or get(*keys).count("NO_SHARD") != 1,
            keys,
            "both sharded or neither",
            "the teacher follows the student's weights: use auto for the teacher",
        )


def _for_training(values: dict[str, Any]) -> Iterator[tuple[bool, list[str], str, str]]:
    """Yield, like `_combinations`, the rules that are irrelevant if a configuration describes existing weights."""
    yield (
        values["student.in_chans"] == _RGB,
        ["student.in_chans"],
        f"{_RGB}, the channels of the images that training reads",
        f"use student.in_chans={_RGB}; models of other channels can be loaded for features",
    )
    yield (
        not values["student.channel_adaptive"],
        ["student.channel_adaptive"],
        f"false, because training reads images of {_RGB} channels together",
        "set student.channel_adaptive=false",
    )
    yield (
        not values["train.cell_augmentation"],
        ["train.cell_augmentation"],
        "false, because this package does not have that augmentation",
        "set train.cell_augmentation=false and the augmentation.* keys: for microscopy augmentation.hue=0 "
        "augmentation.saturation=0 augmentation.gray_p=0 augmentation.solarize_p=0",
    )
    yield (
        # 1 is a fork's default; without folders it holds out nothing
        values["train.frac"] in (0, 1) or bool(values["train.path_preserved"]),
        ["train.frac", "train.path_preserved"],
        "train.path_preserved to name the images",
        "name folders, or a text file for the list of held-out images",
    )
    keys = [f"evaluation.online.{name}" for name in ("knn_train", "knn_val", "best")]
    train, val, best = (values[key] for key in keys)
    yield (bool(train) == bool(val), keys[:2], "both or neither", "name the neighbours and the images to classify")
    yield (
        best != "knn" or bool(train),
        keys[::-2],
        "labelled images for kNN",
        "set evaluation.online.knn_train and knn_val",
    )


def list_notes(values: dict[str, Any], given: set[str]) -> list[str]:
    """Return warnings about valid settings whose effect may be unexpected.

    Args:
        values: value of each key by dotted name, `optim.lr` computed.
        given: keys that the user set to a value other than the default.
    """
    notes = []
    unused = [key for key, field in all_keys().items() if key in given and field.json_schema_extra["unused"]]
    if unused:
        notes.append(f"accepted for compatibility with upstream but not used: {', '.join(unused)}")
    if not values["ibot.separate_head"]:
        ignored = [key for key in values if key in given and key.startswith("ibot.head_")]
        if ignored:
            notes.append(f"ignored because ibot.separate_head is false: {', '.join(ignored)}")
    epochs, freeze = values["optim.epochs"], values["optim.freeze_last_layer_epochs"]
    if share_of_run(freeze, epochs) >= 1:
        notes.append(
            f"optim.freeze_last_layer_epochs = {freeze} covers the whole run (optim.epochs = {epochs:g}): "
            "the prototypes of the heads are never trained"
        )
    if share_of_run(values["student.freeze_backbone_epochs"], epochs) >= 1:
        notes.append("student.freeze_backbone_epochs covers the whole run: only the heads are trained")
    masks = values["ibot.mask_sample_probability"] * values["ibot.mask_ratio_min_max"][1]
    if values["ibot.loss_weight"] > 0 and masks == 0:
        notes.append("ibot.loss_weight is above 0, but the mask settings mask nothing: the iBOT loss stays 0")
    if values["optim.min_lr"] > values["optim.lr"]:
        notes.append(
            f"optim.min_lr = {values['optim.min_lr']:g} is above the peak optim.lr = {values['optim.lr']:g}: "
            "the learning rate rises over the run"
        )
    return notes


def split_global_batch(
    values: dict[str, Any], where: Callable[[str], str], world_size: int, mistakes: Mistakes
) -> None:
    """Set the two keys that depend on `optim.global_batch`, if set, so that processes x images x batches equal it.

    Overrides of the two are limits: the maximum number of images and the minimum number of batches. Values in a config
    file are ignored, because they come from a recipe or from a run with another number of processes. The number of
    images that fit on a GPU is determined later (train/global_batch.py).

    Args:
        values: value of each key by dotted name; changed in place.
        where: names the source of a key's value, such as a file.
    """
    whole = values[GLOBAL]
    if not whole or not mistakes.keys.isdisjoint((GLOBAL, BATCH, ACCUMULATED)):
        return
    share, rest = divmod(whole, world_size)
    if rest:
        divisors = divisors_of(whole)
        fits = [max(n for n in divisors if n < world_size), *[n for n in divisors[::-1] if n > world_size][:1]]
        others = " or ".join(str(n) for n in (whole - rest, whole - rest + world_size) if n)
        fix = f"start {' or '.join(map(str, fits))} processes, or for a new run set {GLOBAL}={others}"
        mistakes.add(f"{GLOBAL} ({where(GLOBAL)})", f"a multiple of the {world_size} processes", str(whole), fix)
        return
    fewest = values[ACCUMULATED] if where(ACCUMULATED) == "override" else 1
    if fewest > share:
        got = f"{fewest} with {GLOBAL} = {whole} in {world_size} processes"
        mistakes.add(f"{ACCUMULATED} (override)", f"at most the {share} images of a process", got, "lower it")
        return
    most = values[BATCH] if where(BATCH) == "override" else share
    values[BATCH] = next(n for n in divisors_of(share) if n <= min(most, share // fewest))
    values[ACCUMULATED] = share // values[BATCH]


def divisors_of(number: int) -> list[int]:
    """Return all divisors in descending order."""
    return [n for n in range(number, 0, -1) if number % n == 0]


def plain_arch_name(arch: str) -> str:
    """Strip upstream's `_memeff` suffix, which selected an attention kernel there and has no effect here."""
    return arch.removesuffix("_memeff")


def share_of_run(length: float | str, epochs: float) -> float:
    """Return a length in epochs, or a percentage such as "10%", as a fraction of a run of ``epochs``."""
    return float(length.rstrip("%")) / 100 if isinstance(length, str) else length / epochs


def _nearest_arch(name: str) -> str:
    if released := _RELEASED.fullmatch(name):
        letter, patch, registers = released.groups()
        fix = f"set student.arch={_ARCH_OF_LETTER[letter]}" + (f" student.patch_size={patch}" if patch else "")
        return fix + (f" student.num_register_tokens={registers or 4}" if registers is not None else "")
    near = difflib.get_close_matches(name, DEPTH_OF_ARCH, n=1, cutoff=0.5)
    return f"did you mean {near[0]}?" if near else ""
