"""Dataset definition files: the classes, and for train, val and test the sources of labelled images.

.. code-block:: yaml

    classes: [red cell, parasite]
    train:
      - {coco: train.json, images: images/}         # COCO JSON; file names are relative to ``images``, or to the JSON
      - {yolo: clinic/data.yaml}                    # the same part (train) of a YOLO dataset
      - {images: tissue/images, masks: tissue/png}  # for each image an index PNG of the same stem
    val: val.json                                   # a path alone: COCO JSON, YOLO YAML, or a folder

Paths are relative to the file. A YOLO YAML (``names`` instead of ``classes``) is itself accepted as a definition.
Pretraining reads the images (:class:`DefinitionSource`), ``decoder.labels`` the labels as well.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, NamedTuple

import yaml

from dinov2_custom.errors import DataError
from dinov2_custom.files import parse_json_object

from .index import Index, PathTable, pack_texts
from .listing import list_images
from .sources import PathSource, pack_passed_over, unreadable

PARTS = ("train", "val", "test")
OTHER_NAMES = {"val": ("val", "valid", "validation")}
SUFFIXES = (".yaml", ".yml")
FORMS = "a path, {coco: .., images: ..}, {yolo: ..} or {images: .., masks: ..}"


class LabelSource(NamedTuple):
    """One source of labelled images.

    kind: "coco", "yolo" or "masks". labels: the JSON, the YAML, or the folder of masks. images: the folder of images;
    "" for YOLO. part: the part of a YOLO dataset.
    """

    kind: str
    labels: str
    images: str
    part: str


class Definition(NamedTuple):
    """A definition file: its classes, and the sources of each part that it has."""

    path: str
    classes: tuple[str, ...]
    parts: dict[str, tuple[LabelSource, ...]]


class YoloDataset(NamedTuple):
    """A YOLO YAML: class names by index, and for each part that it has, folders or lists of images."""

    path: str
    names: dict[int, str]
    parts: dict[str, tuple[str, ...]]


def read_definition(path: str | os.PathLike[str]) -> Definition:
    """Read a definition file, or a YOLO YAML.

    Raises:
        DataError: it cannot be read, or is none; lists all faults of its entries.
    """
    path = os.path.abspath(os.path.expanduser(path))
    content = _read_yaml(path)
    if "names" in content and "classes" not in content:
        yolo = read_yolo(path)
        classes = tuple(name for _, name in sorted(yolo.names.items()))
        return Definition(path, classes, {part: (LabelSource("yolo", path, "", part),) for part in yolo.parts})
    wrong, parts = [], {}
    classes = content.get("classes")
    if not isinstance(classes, list) or not classes or not all(isinstance(one, str | int) for one in classes):
        wrong.append(f"classes: expected a list of names, got {_kind(classes)}")
    elif len({str(one) for one in classes}) < len(classes):
        wrong.append("classes: expected every name once")
    if unknown := sorted(str(key) for key in content if key not in ("classes", *PARTS)):
        wrong.append(f"{', '.join(unknown)}: unknown key (there are classes, {', '.join(PARTS)})")
    for part in PARTS:
        value = content.get(part)
        if value is None:
            continue
        sources = []
        for number, one in enumerate(value if isinstance(value, list) else [value], start=1):
            try:
                sources.append(as_source(one, os.path.dirname(path), part))
            except DataError as e:
                wrong.append(f"{part}, source {number}: {e}")
        if not sources and not wrong:
            wrong.append(f"{part}: expected sources, got an empty list")
        parts[part] = tuple(sources)
    if not parts and not wrong:
        wrong.append(f"expected sources in {', '.join(PARTS)}, got none")
    if wrong:
        raise DataError(f"expected a dataset definition (docs/decoder.md): {path}\n" + "\n".join(wrong))
    return Definition(path, tuple(map(str, classes)), parts)


def as_source(value: Any, folder: str, part: str) -> LabelSource:
    """Return the source that an entry of a definition file in ``folder`` describes.

    Raises:
        DataError: it has another form, or is a folder or file of an unknown kind.
    """

    def place(text: Any) -> str:
        if not isinstance(text, str | os.PathLike) or not os.fspath(text):
            raise DataError(f"expected {FORMS}, got {_kind(text)}")
        return os.path.normpath(os.path.join(folder, os.path.expanduser(text)))

    if not isinstance(value, Mapping):
        return _source_of_path(place(value), part)
    keys = set(value)
    if keys in ({"coco"}, {"coco", "images"}):
        labels = place(value["coco"])
        return LabelSource("coco", labels, place(value.get("images", os.path.dirname(labels))), part)
    if keys == {"yolo"}:
        return LabelSource("yolo", place(value["yolo"]), "", part)
    if keys == {"images", "masks"}:
        return LabelSource("masks", place(value["masks"]), place(value["images"]), part)
    raise DataError(f"expected {FORMS}, got the keys {', '.join(map(str, sorted(keys, key=str))) or '{}'}")


def _source_of_path(path: str, part: str) -> LabelSource:
    """Return the source that a path describes: by its suffix, or by what the folder contains."""
    suffix = os.path.splitext(path)[1].lower()
    if not os.path.isdir(path):
        if suffix == ".json":
            return LabelSource("coco", path, os.path.dirname(path), part)
        if suffix in SUFFIXES:
            return LabelSource("yolo", path, "", part)
        raise DataError(f"expected COCO JSON (.json), YOLO's YAML (.yaml) or a folder, got {path}")
    images, masks = os.path.join(path, "images"), os.path.join(path, "masks")
    if os.path.isdir(images) and os.path.isdir(masks):
        return LabelSource("masks", masks, images, part)
    names = sorted(name for name in os.listdir(path) if name.lower().endswith((".json", *SUFFIXES)))
    if len(names) == 1:
        return _source_of_path(os.path.join(path, names[0]), part)
    got = ", ".join(names[:5]) or "none of them"
    raise DataError(f"expected images/ and masks/, or one .json or .yaml file, in {path}, got {got}")


def read_yolo(path: str) -> YoloDataset:
    """Read a YOLO YAML.

    Raises:
        DataError: it cannot be read, or is none.
    """
    if path.lower().endswith(".json"):
        raise DataError(f"expected YOLO's YAML, got JSON: {path}; write {{coco: ..}} for COCO JSON")
    content = _read_yaml(path)
    names = content.get("names")
    if isinstance(names, list):
        names = dict(enumerate(names))
    numbered = isinstance(names, dict) and all(isinstance(key, int) and key >= 0 for key in names)
    if not names or not numbered or not all(isinstance(name, str | int) for name in names.values()):
        raise DataError(f"expected YOLO's YAML with names, a list or a mapping of numbers: {path}, got {_kind(names)}")
    root = content.get("path") or ""
    if not isinstance(root, str):
        raise DataError(f"path: expected a folder: {path}, got {_kind(root)}")
    root = os.path.join(os.path.dirname(os.path.abspath(path)), os.path.expanduser(root))
    parts = {}
    for part in PARTS:
        value = next((content[key] for key in OTHER_NAMES.get(part, (part,)) if content.get(key)), None)
        places = value if isinstance(value, list) else [value] if value else []
        if not all(isinstance(one, str) for one in places):
            raise DataError(f"{part}: expected folders or lists of images: {path}")
        if places:
            parts[part] = tuple(_yolo_place(root, one) for one in places)
    return YoloDataset(path, {key: str(name) for key, name in names.items()}, parts)


def _yolo_place(root: str, place: str) -> str:
    path = os.path.normpath(os.path.join(root, os.path.expanduser(place)))
    if not os.path.exists(path) and place.startswith("../"):
        # exports of annotation tools write "../train/images" for a folder beside the YAML
        path = os.path.normpath(os.path.join(root, place[3:]))
    return path


def images_of(source: LabelSource) -> list[str]:
    """Return the paths of the images of a source, in its order; those of COCO JSON may not exist.

    Raises:
        DataError: its files are missing or of another format, or hold no image.
    """
    if source.kind == "coco":
        return coco_images(read_coco(source.labels), source)
    if source.kind == "masks":
        return list_images([source.images])
    dataset = read_yolo(source.labels)
    if source.part not in dataset.parts:
        raise DataError(f"{source.part}: expected folders or lists of images: {source.labels}, got none")
    found: dict[str, None] = {}
    for place in dataset.parts[source.part]:
        found |= dict.fromkeys(_listed(place) if place.lower().endswith(".txt") else list_images([place]))
    return list(found)


def _listed(path: str) -> list[str]:
    """Return the images that a YOLO list names, relative to the list's folder."""
    lines = read_text(path).splitlines()
    return [os.path.normpath(os.path.join(os.path.dirname(path), line.strip())) for line in lines if line.strip()]


def read_coco(path: str) -> dict[str, Any]:
    """Read COCO JSON: an object with a list ``images``.

    Raises:
        DataError: it cannot be read, or is of another format.
    """
    try:
        content = parse_json_object(read_text(path), finite=False)
    except ValueError as e:
        raise DataError(f"expected COCO JSON: {path} ({e})") from e
    if not isinstance(content.get("images"), list):
        keys = ", ".join(list(content)[:8])
        raise DataError(f"expected COCO JSON with a list 'images': {path}, got an object with {keys or 'nothing'}")
    return content


def coco_images(content: dict[str, Any], source: LabelSource) -> list[str]:
    """Return the image paths of COCO JSON; entries without a file name are left out."""
    names = [image.get("file_name") for image in content["images"] if isinstance(image, dict)]
    return [coco_path(source, name) for name in names if isinstance(name, str) and name]


def coco_path(source: LabelSource, name: str) -> str:
    return os.path.normpath(os.path.join(source.images, name))


def read_text(path: str) -> str:
    """Return a file's text.

    Raises:
        DataError: it is missing, not a regular file, or not UTF-8.
    """
    if not os.path.isfile(path):  # opening a named pipe blocks
        raise DataError(f"expected a file: {path}, got {'another kind' if os.path.exists(path) else 'nothing'}")
    try:
        with open(path, encoding="utf-8-sig") as file:  # COCO JSON of 1 GiB exists, above the limit for images
            return file.read()
    except OSError as e:
        raise unreadable(e, path) from e
    except UnicodeDecodeError as e:
        raise DataError(f"expected text in UTF-8: {path} ({e})") from e


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, which by itself keeps the last of two equal keys: a second ``train`` hides the first."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    problem = f"{key.value!r:.100} is there twice"
                    raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
                seen.add(key.value)
        return super().construct_mapping(node, deep)


def _read_yaml(path: str) -> dict[str, Any]:
    try:
        content = yaml.load(read_text(path), _Loader)
    except (yaml.YAMLError, RecursionError, ValueError) as e:
        raise DataError(f"expected YAML: {path} ({' '.join(str(e).split())})") from e
    if not isinstance(content, dict):
        raise DataError(f"expected a dataset definition or YOLO's YAML: {path}, got {_kind(content)}")
    return content


def _kind(value: Any) -> str:
    """Describe a value of a file for an error; never its text, which aliases can make arbitrarily long."""
    return "nothing" if value is None else f"a {type(value).__name__}"


class DefinitionSource(PathSource):
    """The images of one part of a definition file, without labels, each once, in the order of its sources.

    Raises:
        DataError: the definition or one of its sources cannot be read, or the part has no image.
    """

    def __init__(self, path: str | os.PathLike[str], part: str = "train"):
        definition = read_definition(path)
        sources = definition.parts.get(part, ())
        if not sources:
            got = ", ".join(definition.parts)
            raise DataError(f"part: expected one of {got} in {definition.path}, got {part!r}")
        found: dict[str, None] = {}
        self._parts: list[tuple[str, int]] = []
        for source in sources:
            before = len(found)
            found |= dict.fromkeys(images_of(source))
            self._parts.append((source.labels, len(found) - before))
        if not found:
            raise DataError(f"expected images in {part} of {definition.path}, got none")
        self.index = Index(pack_texts([list(found)], "path") | pack_passed_over([]))
        self.paths = PathTable(index=self.index)

    def parts(self) -> list[tuple[str, int]]:
        return self._parts
