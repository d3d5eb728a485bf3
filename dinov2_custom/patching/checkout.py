"""Append marked blocks to a checkout's modules, find them, and remove them byte for byte.

Nothing outside the markers is changed.
"""

from __future__ import annotations

import ast
import os
import re
from pathlib import Path
from typing import NamedTuple

from dinov2_custom.errors import ConfigError
from dinov2_custom.files import atomic_write
from dinov2_custom.patching.patch_file import Patch

_BEGIN = "# >>> patch {name} (dinov2_custom; remove with: python run/patches/apply.py <checkout> --revert) >>>"
_END = "# <<< patch {name} <<<"
_NO_NEWLINE = "# (the line before this one had no line ending)"
_BLOCK = re.compile(
    rb"(?P<added>\r?\n" + re.escape(_NO_NEWLINE.encode()) + rb"\r?\n)?"
    rb"# >>> patch (?P<name>\w+) \(dinov2_custom;[^\n]*\n(?P<code>.*?)# <<< patch (?P=name) <<<\r?\n",
    re.DOTALL,
)


_TRAINING = "dinov2/train/train.py"


class File(NamedTuple):
    """A module of the checkout.

    Attributes:
        base: its bytes without this package's blocks.
        blocks: patch name -> code of its block, in the file's order.
    """

    path: Path
    now: bytes
    base: bytes
    blocks: dict[str, str]


def find_package(checkout: str) -> Path:
    """Return the folder that holds the checkout's package ``dinov2``.

    Raises:
        ConfigError: there is none, or it is this project's alias.
    """
    folder = Path(checkout).expanduser()
    for root in (folder, folder.parent):
        package = root / "dinov2"
        if (package / "__init__.py").is_file() and (root == folder or folder.name == "dinov2"):
            if not (package / "train").is_dir():
                break
            return root
    raise ConfigError(
        f"expected a checkout of dinov2 (a folder with dinov2/__init__.py and dinov2/train), got {folder}"
    )


def read_file(path: Path) -> File:
    """Read a module and separate this package's blocks."""
    now = path.read_bytes()
    blocks = {m["name"].decode(): m["code"].decode().replace("\r\n", "\n") for m in _BLOCK.finditer(now)}
    first = next(_BLOCK.finditer(now), None)
    base = now
    if first:
        rest = _BLOCK.sub(b"", now[first.start() :])
        # an added line ending is removed with the blocks, unless something was written after them
        ending = first["added"].split(_NO_NEWLINE.encode())[0] if first["added"] and rest else b""
        base = now[: first.start()] + ending + rest
    return File(path, now, base, blocks)


def names_of_blocks(content: bytes) -> list[str]:
    """Return the names of the patches whose blocks a module contains."""
    return [match["name"].decode() for match in _BLOCK.finditer(content)]


def with_blocks(file: File, blocks: dict[str, str]) -> bytes:
    """Return the module's bytes with exactly these blocks at its end."""
    if not blocks:
        return file.base
    newline = "\r\n" if b"\r\n" in file.base else "\n"
    text = "" if file.base.endswith(b"\n") or not file.base else f"\n{_NO_NEWLINE}\n"
    for name, code in blocks.items():
        text += f"{_BEGIN.format(name=name)}\n{code}{_END.format(name=name)}\n"
    return file.base + text.replace("\n", newline).encode()


def missing_symbols(patch: Patch, root: Path) -> list[str]:
    """Return a line for every module, name or argument that ``patch`` needs and ``root`` lacks."""
    lines = []
    for path, names in patch.symbols.items():
        tree, reason = _parsed(root / path)
        if tree is None:
            lines.append(f"{patch.name}: {path}: {reason}")
        else:
            bound = _bound_names(tree.body)
            lines += [f"{patch.name}: {path} has no {name}" for name in names if name not in bound]
    for path, arguments in patch.requires.items():
        tree, reason = _parsed(root / path)
        nodes = [] if tree is None else ast.walk(tree)
        given = {f"{node.arg}={ast.unparse(node.value)}" for node in nodes if isinstance(node, ast.keyword)}
        lines += [f"{patch.name}: {path}: {reason or f'no call with {a}'}" for a in arguments if a not in given]
    return lines


def _parsed(path: Path) -> tuple[ast.Module | None, str]:
    if not path.is_file():
        return None, "no such file"
    try:
        return ast.parse(read_file(path).base), ""
    except (SyntaxError, ValueError) as e:
        return None, f"not valid Python: {e}"


def _bound_names(body: list[ast.stmt], prefix: str = "") -> set[str]:
    """Return the names that statements bind, in branches too; for classes also ``Class.member``."""
    names: set[str] = set()
    for node in body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            names.add(prefix + node.name)
            if isinstance(node, ast.ClassDef):
                names |= _bound_names(node.body, f"{prefix}{node.name}.")
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            names |= {prefix + (alias.asname or alias.name.partition(".")[0]) for alias in node.names}
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {prefix + n.id for t in targets for n in ast.walk(t) if isinstance(n, ast.Name)}
        else:
            for part in ("body", "orelse", "finalbody"):
                names |= _bound_names(getattr(node, part, []), prefix)
            for handler in getattr(node, "handlers", []):
                names |= _bound_names(handler.body, prefix)
    return names


def unused_names(patch: Patch, root: Path) -> list[str]:
    """Return "path: name" for names that ``patch`` rebinds and the checkout's training, such as a fork's, never uses.

    Training is ``dinov2/train/train.py`` and every module that it imports; a name that none of them mentions is unused.
    """
    trees = _training_modules(root)
    used = {name for tree in trees for statement in tree.body for name in _used_names(statement)}
    lines = []
    for path, code in patch.blocks.items():
        body = ast.parse(code).body
        targets = [target for node in body if isinstance(node, ast.Assign) for target in node.targets]
        rebound = _bound_names(body) | {ast.unparse(target) for target in targets}
        for name in patch.symbols[path]:
            owner, _, member = name.rpartition(".")
            called = owner if member.startswith("__") else member
            if trees and name in rebound and called not in used and name not in patch.elsewhere.get(path, ()):
                lines.append(f"{path}: {name}")
    return lines


def _training_modules(root: Path) -> list[ast.Module]:
    found: dict[Path, ast.Module | None] = {}
    todo = [root / _TRAINING]
    while todo:
        path = todo.pop()
        if path not in found:
            found[path] = tree = _parsed(path)[0]
            todo += _imported_files(tree, path, root) if tree else []
    return [tree for tree in found.values() if tree]


def _imported_files(tree: ast.Module, path: Path, root: Path) -> list[Path]:
    """Return the possible paths of the modules imported by one module, including their packages."""
    own = path.relative_to(root).with_suffix("").parts
    names: list[list[str]] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name.split(".") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            start = list(own[: len(own) - node.level]) if node.level else []
            start += node.module.split(".") if node.module else []
            names += [[*start, alias.name] for alias in node.names]
    parts = [name[:count] for name in names if name[0] == "dinov2" for count in range(1, len(name) + 1)]
    return [root.joinpath(*one[:-1], ending) for one in parts for ending in (f"{one[-1]}.py", f"{one[-1]}/__init__.py")]


def _used_names(statement: ast.stmt) -> set[str]:
    """Return the names and attributes that a statement reads; excluding a definition's own name inside it."""
    read = [node for node in ast.walk(statement) if isinstance(getattr(node, "ctx", None), ast.Load)]
    names = {node.id for node in read if isinstance(node, ast.Name)}
    names |= {node.attr for node in read if isinstance(node, ast.Attribute)}
    return names - {getattr(statement, "name", "")}


def plan(root: Path, series: list[Patch], chosen: list[Patch], revert: bool) -> dict[Path, tuple[bytes, bytes]]:
    """Return (bytes now, bytes wanted) of every module that changes if ``chosen`` are applied or reverted.

    Blocks of other patches stay; the order in a module is that of ``series``. Blocks of patches that ``series`` no
    longer has are removed when all are reverted.

    Raises:
        ConfigError: a module or symbol required by a patch is missing; names all of them, and nothing may be written.
    """
    problems = [] if revert else [line for patch in chosen for line in missing_symbols(patch, root)]
    if problems:
        raise ConfigError(
            "expected what the patches rebind, got a checkout without it; nothing was changed:\n  "
            + "\n  ".join(problems)
            + "\nleave these out with --only"
        )
    changes = {}
    for path in _modules(root, series, everything=revert and chosen == series):
        file = read_file(path)
        relative = path.relative_to(root).as_posix()
        wanted = dict(file.blocks)
        for patch in chosen:
            wanted.pop(patch.name, None)
            if not revert and relative in patch.blocks:
                wanted[patch.name] = patch.blocks[relative]
        if revert and chosen == series:
            wanted = {}
        order = {patch.name: place for place, patch in enumerate(series)}
        wanted = dict(sorted(wanted.items(), key=lambda item: order.get(item[0], -1)))
        content = with_blocks(file, wanted)
        if content != file.now:
            changes[path] = (file.now, content)
    return changes


def _modules(root: Path, series: list[Patch], everything: bool) -> list[Path]:
    if everything:
        return [path for path in sorted((root / "dinov2").rglob("*.py")) if b"# >>> patch " in path.read_bytes()]
    paths = dict.fromkeys(root / path for patch in series for path in patch.symbols)
    return [path for path in paths if path.is_file()]


def state_of(patch: Patch, root: Path) -> str:
    """Return "applied", "not applied", "partly applied", "another version" or what the checkout lacks."""
    found = {p: read_file(root / p).blocks.get(patch.name) for p in patch.symbols if (root / p).is_file()}
    if patch.symbols.keys() == found.keys() and all(found[path] == code for path, code in patch.blocks.items()):
        return "applied"
    if any(found.values()):
        return "another version is applied" if all(found.values()) else "partly applied"
    lacking = missing_symbols(patch, root)
    return "cannot be applied: " + "; ".join(line.partition(": ")[2] for line in lacking) if lacking else "not applied"


def write(path: Path, content: bytes) -> None:
    """Replace a file atomically, keeping its mode."""
    with atomic_write(path, "wb", exclusive=True) as file:
        os.chmod(file.name, path.stat().st_mode)
        file.write(content)
