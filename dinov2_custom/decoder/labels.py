"""Labelled images of a decoder: COCO JSON, YOLO text labels, folders of masks, and dataset definition files.

:func:`read_split` reads and checks all labels before training and lists every fault at once. Image sizes come from the
headers of the image files, never from the label files.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dinov2_custom.data.definition import (
    SUFFIXES,
    LabelSource,
    as_source,
    coco_path,
    images_of,
    read_coco,
    read_definition,
    read_text,
    read_yolo,
)
from dinov2_custom.data.listing import PatientMap, list_images
from dinov2_custom.errors import ConfigError, DataError

from .instances import (
    IGNORE,
    Faults,
    Instance,
    LabelledImage,
    Split,
    area_of,
    as_numbers,
    check_box,
    check_outline,
    image_size,
    read_mask,
)

logger = logging.getLogger("dinov2")
TASKS = ("detection", "instance", "semantic")
BACKGROUND = "background"
OPENED = tuple[list[str], Callable[[dict[str, int]], Iterator[LabelledImage]]]


def read_split(
    source: str | Path, task: str, part: str = "train", classes: Sequence[str] | None = None
) -> Split:
    """Read and check the labelled images of ``part`` of ``source``.

    With ``task`` "semantic", pixels of COCO or YOLO labels outside all outlines belong to the class "background",
    which is appended to the classes if they lack it.

    Args:
        source: a dataset definition file, COCO JSON, YOLO's YAML, a folder with ``images/`` and ``masks/``, or a folder
            with one such file. ``part`` selects from definitions and YOLO's YAML.
        task: "detection", "instance" or "semantic".
        classes: class names in the order of the indices; None: those of the definition, or all of the labels.

    Raises:
        ConfigError: ``task`` is unknown.
        DataError: labels or images cannot be used; lists the first faults, each with file and line or id, and counts
            all.
    """
    if task not in TASKS:
        raise ConfigError(f"task: expected one of {', '.join(TASKS)}, got {task!r}")
    sources, own = _sources(Path(source).expanduser(), part)
    classes = list(classes) if classes is not None else own
    faults, opened = Faults(), []
    for one in sources:
        try:
            opened.append((one, *_READERS[one.kind](one, task, faults)))
        except DataError as e:
            faults.add("", str(e))
    if classes is None:
        classes = list(dict.fromkeys(name for _, names, _ in opened for name in names))
        if not classes and opened:
            faults.add(str(source), f"expected class names, got none; {_DEFINE}")
    outlines = any(one.kind != "masks" for one, _, _ in opened)
    if task == "semantic" and outlines and classes and BACKGROUND not in classes:
        classes = [*classes, BACKGROUND]
    if len(classes) > IGNORE:
        faults.add(str(source), f"expected at most {IGNORE} classes, got {len(classes)}")
    index = {name: number for number, name in enumerate(classes)}
    images = [image for _, _, read in opened for image in read(index)]
    labels = sum(len(image.instances) for image in images)
    if not faults.count:
        if not images:
            faults.add(str(source), f"expected images in {part}, got an empty split")
        elif task != "semantic" and not labels:
            faults.add(str(source), f"expected labelled instances in {part}, got {len(images)} images without any")
    faults.raise_if_any(f"{part} of {source}")
    if faults.clipped:
        logger.info(f"labels: {faults.clipped:,} boxes or outlines up to 1 pixel outside their image were clipped")
    return Split(tuple(classes), tuple(images))


def read_train_and_val(train: str | Path, val: str | Path, task: str) -> tuple[Split, Split]:
    """Read and check both; the classes of ``val`` are those of ``train``.

    Raises:
        ConfigError, DataError: see :func:`read_split`; faults of both are in one error.
    """
    found: list[Split] = []
    wrong: list[DataError] = []
    for source, part in ((train, "train"), (val, "val")):
        try:
            found.append(read_split(source, task, part, found[0].classes if found else None))
        except DataError as e:
            wrong.append(e)
    if wrong:
        raise DataError("\n".join(map(str, wrong))) from wrong[0]
    return found[0], found[1]


_DEFINE = "name them in a dataset definition file (docs/decoder.md)"


def _sources(source: Path, part: str) -> tuple[tuple[LabelSource, ...], list[str] | None]:
    """Return the sources of ``part``, and the classes of a definition file."""
    if source.is_dir():
        found = as_source(source, os.getcwd(), part)
        source = Path(found.labels) if found.kind == "yolo" else source
        if found.kind != "yolo":
            return (found,), None
    if source.suffix.lower() not in SUFFIXES:
        return (as_source(source, os.getcwd(), part),), None
    definition = read_definition(source)
    if part not in definition.parts:
        raise DataError(f"expected {part} in {source}, got {', '.join(definition.parts) or 'no part'}")
    return definition.parts[part], list(definition.classes)


def _sizes(paths: Sequence[str], places: Sequence[str], faults: Faults) -> list[tuple[int, int] | None]:
    """Return (width, height) of each image; None for those reported as faults of ``places``."""
    sizes = []
    for place, size in zip(places, PatientMap().map(image_size, paths), strict=True):
        if isinstance(size, str):
            faults.add(place, size)
        sizes.append(None if isinstance(size, str) else size)
    return sizes


# COCO


def _open_coco(source: LabelSource, task: str, faults: Faults) -> OPENED:
    content = read_coco(source.labels)
    for key in ("annotations", "categories"):
        if not isinstance(content.get(key), list):
            raise DataError(f"expected COCO JSON with a list '{key}': {source.labels}")
    names = {}
    for number, one in enumerate(content["categories"]):
        if not isinstance(one, dict) or not _is_id(one.get("id")) or not isinstance(one.get("name"), str):
            faults.add(source.labels, f"categories[{number}]: expected an object with id and name")
        elif one["id"] in names:
            faults.add(source.labels, f"categories: id {one['id']!r:.40} is there twice")
        else:
            names[one["id"]] = one["name"]
    ordered = [names[key] for key in sorted(names, key=lambda key: (isinstance(key, str), key))]

    def read(index: dict[str, int]) -> Iterator[LabelledImage]:
        images = _coco_images(content["images"], source, faults)
        by_image: dict[Any, list[Instance]] = {key: [] for key in images}
        known = {one.get("id") for one in content["images"] if isinstance(one, dict) and _is_id(one.get("id"))}
        seen = set()
        for number, one in enumerate(content["annotations"]):
            key = one.get("id") if isinstance(one, dict) else None
            if not _is_id(key):
                faults.add(source.labels, f"annotations[{number}]: expected an object with an id")
                continue
            where = f"{source.labels} annotation {key}"
            if key in seen:
                faults.add(where, "its id is there twice")
                continue
            seen.add(key)
            image = one.get("image_id")
            if not _is_id(image) or image not in known:
                faults.add(where, f"expected the id of an image, got image_id {image!r:.40}")
            elif image in images:
                width, height = images[image][1:]
                found = _coco_instance(one, width, height, task, names, index, faults, where)
                by_image[image] += [found] if found else []
        outside = index.get(BACKGROUND, IGNORE)
        for key, (path, width, height) in images.items():
            yield LabelledImage(Path(path), width, height, tuple(by_image[key]), None, outside)

    return ordered, read


def _coco_images(entries: list[Any], source: LabelSource, faults: Faults) -> dict[Any, tuple[str, int, int]]:
    """Return id -> (path, width, height) of all usable images."""
    wanted: dict[Any, dict[str, Any]] = {}
    for number, one in enumerate(entries):
        if not isinstance(one, dict) or not _is_id(one.get("id")) or not isinstance(one.get("file_name"), str):
            faults.add(source.labels, f"images[{number}]: expected an object with id and file_name")
        elif one["id"] in wanted:
            faults.add(f"{source.labels} image {one['id']}", "its id is there twice")
        else:
            wanted[one["id"]] = one
    paths = [coco_path(source, one["file_name"]) for one in wanted.values()]
    if paths and not os.path.isdir(source.images):
        missing = f"expected a folder of images: {source.images}; give {{coco: .., images: ..}} in a definition file"
        faults.add(source.labels, missing)
        return {}
    found = {}
    sizes = _sizes(paths, [f"{source.labels} image {key}" for key in wanted], faults)
    for (key, one), path, size in zip(wanted.items(), paths, sizes, strict=True):
        stated = (one.get("width"), one.get("height"))
        if size is not None and None not in stated and stated != size:
            text = f"expected the size of the file, {size[0]} x {size[1]}, got {stated[0]!r:.20} x {stated[1]!r:.20}"
            faults.add(f"{source.labels} image {key}", f"{text}: {path}")
        elif size is not None:
            found[key] = (path, *size)
    return found


def _coco_instance(
    one: dict[str, Any],
    width: int,
    height: int,
    task: str,
    names: dict[Any, str],
    index: dict[str, int],
    faults: Faults,
    where: str,
) -> Instance | None:
    category = one.get("category_id")
    name = names.get(category) if _is_id(category) else None
    if name is None or name not in index:
        got = f"category_id {category!r:.40}" if name is None else f"{name!r:.80}"
        if index:  # without any class there is one fault already
            faults.add(where, f"expected one of the {len(index)} classes, got {got}")
        return None
    box = check_box(one.get("bbox"), width, height, faults, where)
    outline = None
    if task != "detection" and box is not None:
        outline = check_outline(one.get("segmentation"), width, height, faults, where)
    crowd = one.get("iscrowd", 0)
    if crowd not in (0, 1):
        faults.add(where, f"expected iscrowd 0 or 1, got {crowd!r:.40}")
    if box is None or (task != "detection" and outline is None):
        return None
    stated = as_numbers([one.get("area")])
    area = stated[0] if stated and stated[0] > 0 else box[2] * box[3] if outline is None else area_of(outline)
    return Instance(index[name], box, outline, area, crowd == 1)


def _is_id(value: Any) -> bool:
    return isinstance(value, int | str) and not isinstance(value, bool)


# YOLO


def _open_yolo(source: LabelSource, task: str, faults: Faults) -> OPENED:
    dataset = read_yolo(source.labels)
    paths = images_of(source)

    def read(index: dict[str, int]) -> Iterator[LabelledImage]:
        labels = [_label_file(path) for path in paths]
        if not any(map(os.path.isfile, labels)):
            expected = f"expected label files such as {labels[0]}, got none for {len(paths)} images"
            faults.add(source.labels, f"{expected}; YOLO's are in labels/ where the images are in images/")
            return
        _check_all_have_images(set(labels), source, faults)
        outside = index.get(BACKGROUND, IGNORE)
        for path, label, size in zip(paths, labels, _sizes(paths, [source.labels] * len(paths), faults), strict=True):
            if size is not None:
                found = _yolo_instances(label, *size, task, dataset.names, index, faults)
                yield LabelledImage(Path(path), *size, tuple(found), None, outside)

    return [name for _, name in sorted(dataset.names.items())], read


def _label_file(path: str) -> str:
    """Return YOLO's label file of an image: in ``labels`` instead of the last folder ``images``, with suffix .txt."""
    folder, name = os.path.split(path)
    head, middle, tail = f"{folder}{os.sep}".rpartition(f"{os.sep}images{os.sep}")
    folder = f"{head}{os.sep}labels{os.sep}{tail}" if middle else folder
    return os.path.normpath(os.path.join(folder, f"{os.path.splitext(name)[0]}.txt"))


def _check_all_have_images(labels: set[str], source: LabelSource, faults: Faults) -> None:
    for folder in sorted({os.path.dirname(label) for label in labels if "labels" in label.split(os.sep)}):
        for name in sorted(os.listdir(folder)) if os.path.isdir(folder) else []:
            path = os.path.join(folder, name)
            if name.lower().endswith(".txt") and name != "classes.txt" and path not in labels:
                faults.add(path, f"expected an image of this name in {source.part} of {source.labels}, got none")


def _yolo_instances(
    label: str, width: int, height: int, task: str, names: dict[int, str], index: dict[str, int], faults: Faults
) -> Iterator[Instance]:
    try:
        lines = read_text(label).splitlines() if os.path.exists(label) else []
    except DataError as e:
        faults.add("", str(e))
        return
    for number, line in enumerate(lines, start=1):
        where, words = f"{label} line {number}", line.split()
        if not words:
            continue
        if number == 1 and line.lstrip()[0] in "{[<":
            faults.add(where, "expected YOLO's lines of numbers, got JSON or XML")
            return
        values = as_numbers(words)
        if values is None or not (len(values) == 5 or (len(values) >= 7 and len(values) % 2)):
            got = f"{len(words)} values" if values else f"{line.strip()!r:.60}"
            faults.add(where, f"expected a class and x y width height, or a class and 3 or more points, got {got}")
            continue
        name = names.get(int(values[0])) if values[0] == int(values[0]) else None
        if name not in index:
            got = f"{words[0]:.20}" if name is None else f"{name!r:.80}"
            faults.add(where, f"expected one of the {len(index)} classes, got {got}")
            continue
        if max(values[1:]) > 2:
            faults.add(where, "expected fractions of the image's size, got larger values; are they pixels?")
            continue
        if len(values) == 5:
            x, y, w, h = values[1:]
            outline = None
            corner = ((x - w / 2) * width, (y - h / 2) * height)
            box = check_box((*corner, w * width, h * height), width, height, faults, where)
            if box and task != "detection":
                faults.add(where, f"expected an outline for the task {task}, got a box")
                continue
        else:
            points = [value * (height if at % 2 else width) for at, value in enumerate(values[1:])]
            outline = check_outline([points], width, height, faults, where)
            if outline is None:
                continue
            xs, ys = outline[0][::2], outline[0][1::2]
            box = check_box((min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys)), width, height, faults, where)
        if box:
            area = box[2] * box[3] if outline is None else area_of(outline)
            yield Instance(index[name], box, outline if task != "detection" else None, area, False)


# masks


def _open_masks(source: LabelSource, task: str, faults: Faults) -> OPENED:
    if task != "semantic":
        raise DataError(f"expected COCO or YOLO labels for the task {task}, got a folder of masks: {source.labels}")
    images, masks = _by_stem(source.images, faults), _by_stem(source.labels, faults)

    def read(index: dict[str, int]) -> Iterator[LabelledImage]:
        for stem in sorted(images.keys() ^ masks.keys()):
            if stem in images:
                faults.add(images[stem], f"expected a mask of the same name in {source.labels}")
            else:
                faults.add(masks[stem], f"expected an image of the same name in {source.images}")
        both = [stem for stem in images if stem in masks]
        sizes = _sizes([images[stem] for stem in both], [images[stem] for stem in both], faults)
        for stem, size in zip(both, sizes, strict=True):
            if size is not None and _check_mask(masks[stem], size, len(index), faults):
                yield LabelledImage(Path(images[stem]), *size, (), Path(masks[stem]))

    return [], read


def _by_stem(folder: str, faults: Faults) -> dict[str, str]:
    found: dict[str, str] = {}
    for path in list_images([folder]):
        stem = os.path.splitext(os.path.relpath(path, folder))[0]
        if stem in found:
            faults.add(path, f"expected one file of this name, got also {found[stem]}")
        found.setdefault(stem, path)
    return found


def _check_mask(path: str, size: tuple[int, int], num_classes: int, faults: Faults) -> bool:
    try:
        values = read_mask(path)
    except DataError as e:
        faults.add("", str(e))
        return False
    if values.shape != (size[1], size[0]):
        height, width = values.shape
        faults.add(path, f"expected the size of its image, {size[0]} x {size[1]}, got {width} x {height}")
        return False
    beyond = [value for value in np.unique(values).tolist() if not (0 <= value < num_classes or value == IGNORE)]
    if beyond and num_classes:  # without any class there is one fault already
        got = ", ".join(map(str, beyond[:5])) + (" ..." if len(beyond) > 5 else "")
        expected = f"expected values below {num_classes}, the number of classes, or {IGNORE} (ignored)"
        faults.add(path, f"{expected}, got {got}")
    return not beyond


_READERS = {"coco": _open_coco, "yolo": _open_yolo, "masks": _open_masks}
