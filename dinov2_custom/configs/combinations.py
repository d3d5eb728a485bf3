"""Check configuration values against each other.

Not the type or range of one value (values.py). Read `check_combinations` for errors and `list_notes` for warnings.
"""

import difflib
import re
from collections.abc import Callable
from typing import Any

from dinov2_custom.configs.archs import DEPTH_OF_ARCH, plain_arch_name
from dinov2_custom.configs.mistakes import Mistakes
from dinov2_custom.configs.schema import all_options
from dinov2_custom.configs.values import share_of_run

Problem = tuple[str, str] | None  # (expected, what to do)
_RGB = 3
_RELEASED = re.compile(r"(?:dinov2_)?vit_?([sblg])(\d+)?(?:_reg(\d*))?")  # dinov2_vitb14_reg, the name of weights
_ARCH_OF_LETTER = {"s": "vit_small", "b": "vit_base", "l": "vit_large", "g": "vit_giant2"}


def check_combinations(
    values: dict[str, Any], where: Callable[[str], str], mistakes: Mistakes, *, training: bool = True
) -> None:
    """Report every pair of values that cannot work together, and with ``training`` what cannot be trained.

    Args:
        values: value of each key by dotted name.
        where: names the source of a key's value, such as a file.
        mistakes: filled; keys already in it are not looked at again.
    """
    for keys, check in _CHECKS + (_TRAINING_CHECKS if training else ()):
        if not mistakes.keys.isdisjoint(keys):
            continue
        problem = check(*(values[key] for key in keys))
        if problem is None:
            continue
        expected, fix = problem
        first, *others = keys
        got = repr(values[first])
        if others:
            got += " with " + ", ".join(f"{key} = {values[key]!r} ({where(key)})" for key in others)
        mistakes.add(f"{first} ({where(first)})", expected, got, fix, key="" if others else first)


def list_notes(values: dict[str, Any], given: set[str]) -> list[str]:
    """Return warnings about settings that work but do not do what one may think.

    Args:
        values: value of each key by dotted name, `optim.lr` computed.
        given: keys the user set to another value than the default.
    """
    notes = []
    options = all_options()
    unused = [key for key in values if key in given and options[key].unused]
    if unused:
        notes.append(f"accepted for upstream's sake, but nothing reads them: {', '.join(unused)}")
    if not values["ibot.separate_head"]:
        ignored = [key for key in values if key in given and key.startswith("ibot.head_")]
        if ignored:
            notes.append(f"ignored because ibot.separate_head is false: {', '.join(ignored)}")
    epochs, freeze = values["optim.epochs"], values["optim.freeze_last_layer_epochs"]
    if share_of_run(freeze, epochs) >= 1:
        notes.append(
            f"optim.freeze_last_layer_epochs = {freeze} covers the whole run (optim.epochs = {epochs:g}): "
            "the prototypes of the heads never train"
        )
    if share_of_run(values["student.freeze_backbone_epochs"], epochs) >= 1:
        notes.append("student.freeze_backbone_epochs covers the whole run: only the heads train")
    masks = values["ibot.mask_sample_probability"] * values["ibot.mask_ratio_min_max"][1]
    if values["ibot.loss_weight"] > 0 and masks == 0:
        notes.append("ibot.loss_weight is above 0, but the mask settings mask nothing: the iBOT loss stays 0")
    if values["optim.min_lr"] > values["optim.lr"]:
        notes.append(
            f"optim.min_lr = {values['optim.min_lr']:g} is above the peak optim.lr = {values['optim.lr']:g}: "
            "the learning rate rises over the run"
        )
    return notes


def _arch(arch: str) -> Problem:
    name = plain_arch_name(arch)
    if name in DEPTH_OF_ARCH:
        return None
    if released := _RELEASED.fullmatch(name):
        letter, patch, registers = released.groups()
        fix = f"student.arch={_ARCH_OF_LETTER[letter]}" + (f" student.patch_size={patch}" if patch else "")
        fix += f" student.num_register_tokens={registers or 4}" if registers is not None else ""
        return f"one of {', '.join(DEPTH_OF_ARCH)}", f"set {fix}"
    near = difflib.get_close_matches(name, DEPTH_OF_ARCH, n=1, cutoff=0.5)
    return f"one of {', '.join(DEPTH_OF_ARCH)}", f"did you mean {near[0]}?" if near else ""


def _block_chunks(chunks: int, arch: str) -> Problem:
    depth = DEPTH_OF_ARCH[plain_arch_name(arch)]
    return (f"at most the {depth} blocks of the network", "use 0 for no chunks") if chunks > depth else None


def _global_size(size: int, patch: int) -> Problem:
    return _divisible("crops.global_crops_size", size, patch)


def _local_size(size: int, patch: int, number: int) -> Problem:
    return _divisible("crops.local_crops_size", size, patch) if number else None


def _divisible(key: str, size: int, patch: int) -> Problem:
    if size % patch == 0:
        return None
    valid = [str(near) for near in (size // patch * patch, (size // patch + 1) * patch) if near > 0]
    valid.sort(key=lambda near: abs(int(near) - size))
    return f"a multiple of the patch size {patch}", f"use {key}={' or '.join(valid)}"


def _warmup(warmup: float | str, epochs: float) -> Problem:
    if share_of_run(warmup, epochs) <= 1:
        return None
    return "at most optim.epochs", f"set optim.warmup_epochs=10% (of the run) or {epochs / 10:g}, or raise optim.epochs"


def _one_length(steps: int, hours: float) -> Problem:
    return ("0 when the other is set", "choose one of them for the length of the run") if steps and hours else None


def _both_sharded(teacher: str, student: str) -> Problem:
    if "auto" in (teacher, student) or (teacher == "NO_SHARD") == (student == "NO_SHARD"):
        return None
    return "both sharded or neither", "the teacher follows the student's weights: use auto for the teacher"


def _some_loss(dino: float, ibot: float) -> Problem:
    return ("dino or ibot above 0", "without both there is nothing to learn from") if dino == ibot == 0 else None


def _like_the_students(teachers: Any, students: Any) -> Problem:
    if teachers in (students, _RGB, False):  # the defaults, where a configuration sets the student's alone
        return None
    return f"the student's, {students!r}", "the teacher follows the student's weights: set both or the student's alone"


def _hold_out(frac: float, places: str | list[str]) -> Problem:
    if places or frac in (0, 1):  # 1: a fork's default, which holds nothing out without folders
        return None
    return "train.path_preserved to say of which images", "name folders, or a text file to keep a list of all images in"


def _intensity(intensity: str | list[float]) -> Problem:
    if intensity == "auto" or intensity[0] < intensity[1]:
        return None
    return "the smaller value first and the greater one second", "give the values that become black and white"


def _rgb(channels: int) -> Problem:
    if channels == _RGB:
        return None
    fix = f"use student.in_chans={_RGB}; models of other channels can be loaded for features"
    return f"{_RGB}, the channels of the images that training reads", fix


def _own_channels(channel_adaptive: bool) -> Problem:
    if not channel_adaptive:
        return None
    return f"false, as training reads images of {_RGB} channels together", "set student.channel_adaptive=false"


def _cell_augmentation(wanted: bool) -> Problem:
    if not wanted:
        return None
    return (
        "false, as that augmentation is not here",
        "set train.cell_augmentation=false and the augmentation.* keys: for microscopy augmentation.hue=0 "
        "augmentation.saturation=0 augmentation.gray_p=0 augmentation.solarize_p=0",
    )


_CHECKS: tuple[tuple[tuple[str, ...], Callable[..., Problem]], ...] = (
    (("student.arch",), _arch),
    (("student.block_chunks", "student.arch"), _block_chunks),
    (("crops.global_crops_size", "student.patch_size"), _global_size),
    (("crops.local_crops_size", "student.patch_size", "crops.local_crops_number"), _local_size),
    (("optim.warmup_epochs", "optim.epochs"), _warmup),
    (("train.max_steps", "train.max_hours"), _one_length),
    (("dino.loss_weight", "ibot.loss_weight"), _some_loss),
    (("data.intensity",), _intensity),
    (("teacher.in_chans", "student.in_chans"), _like_the_students),
    (("teacher.channel_adaptive", "student.channel_adaptive"), _like_the_students),
    *(
        (tuple(f"compute_precision.{side}.{part}.sharding_strategy" for side in ("teacher", "student")), _both_sharded)
        for part in ("backbone", "dino_head", "ibot_head")
    ),
)
# Not for a configuration that only describes existing weights.
_TRAINING_CHECKS: tuple[tuple[tuple[str, ...], Callable[..., Problem]], ...] = (
    (("student.in_chans",), _rgb),
    (("student.channel_adaptive",), _own_channels),
    (("train.cell_augmentation",), _cell_augmentation),
    (("train.frac", "train.path_preserved"), _hold_out),
)
