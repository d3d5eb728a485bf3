"""Read patches: Python files with a header and the lines to append to each module.

The header is the module's docstring: a title, then fields ``Name: text``, continued by indented lines. The code below
is split at lines ``# in <module's path>``; without any, all of it belongs to the single target.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import NamedTuple

from dinov2_custom.errors import ConfigError

FIELDS = ("Why", "Target", "Kind", "Upstream", "Drop-When", "Test")
OPTIONAL = ("Requires", "Elsewhere")
_SECTION = re.compile(r"^# in (\S+)\n", re.MULTILINE)


class Patch(NamedTuple):
    """The content of a file in ``patches/``.

    Attributes:
        symbols: names that each module (path in the checkout) must have.
        requires: keyword arguments (``name=value``) that a call in each module must pass.
        elsewhere: those of ``symbols`` used by launchers or evaluations but not by training.
        blocks: lines to append to each module.
    """

    name: str
    title: str
    fields: dict[str, str]
    symbols: dict[str, list[str]]
    requires: dict[str, list[str]]
    elsewhere: dict[str, list[str]]
    blocks: dict[str, str]


def read_series(folder: Path) -> list[Patch]:
    """Return the patches of ``folder`` in the order given by its file ``series``.

    Raises:
        ConfigError: the folder is missing, or headers or code are malformed; reports all of them at once.
    """
    try:
        lines = (folder / "series").read_text(encoding="utf-8").splitlines()
    except OSError as e:
        raise ConfigError(f"--patches: expected a folder with a file 'series', got {folder}; {e.strerror}") from e
    names = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    patches, wrong = [], []
    for name in names:
        try:
            patches.append(read_patch(folder / f"{name}.py"))
        except ConfigError as e:
            wrong.append(str(e))
    if wrong:
        raise ConfigError("\n".join(wrong))
    return patches


def read_patch(path: Path) -> Patch:
    """Read one patch file.

    Raises:
        ConfigError: the file or a field is missing, or the code is for modules that the header does not name.
    """
    try:
        source = path.read_text(encoding="utf-8")
        tree = ast.parse(source)
    except (OSError, SyntaxError) as e:
        raise ConfigError(f"{path}: expected a patch, could not read it: {e}") from e
    title, fields = _header(ast.get_docstring(tree) or "")
    body = "\n".join(source.splitlines()[tree.body[0].end_lineno if tree.body else 0 :]).strip() + "\n"
    symbols = _targets(fields.get("Target", ""))
    blocks = _blocks(body, list(symbols))
    missing = [name for name in FIELDS if not fields.get(name)]
    unknown = sorted(set(fields) - {*FIELDS, *OPTIONAL})
    if missing or unknown or set(blocks) != set(symbols):
        raise ConfigError(
            f"{path}: expected the fields {', '.join(FIELDS)} and code for the modules of Target, got missing "
            f"{missing}, unknown {unknown}, code for {sorted(blocks)} and targets {sorted(symbols)}"
        )
    requires, elsewhere = (_targets(fields.get(name, "")) for name in OPTIONAL)
    return Patch(path.stem, title, fields, symbols, requires, elsewhere, blocks)


def _header(docstring: str) -> tuple[str, dict[str, str]]:
    title, _, rest = docstring.partition("\n")
    fields: dict[str, str] = {}
    name = ""
    for line in rest.splitlines():
        match = re.match(r"([A-Z][\w-]*): (.*)", line)
        if match:
            name = match[1]
            fields[name] = match[2].strip()
        elif name and line.strip():
            fields[name] += "\n" + line.strip()
    return title.strip(), fields


def _targets(text: str) -> dict[str, list[str]]:
    pairs = (line.partition(": ") for line in text.splitlines())
    return {path: [symbol.strip() for symbol in symbols.split(",")] for path, _, symbols in pairs}


def _blocks(body: str, targets: list[str]) -> dict[str, str]:
    parts = _SECTION.split(body)
    if len(parts) == 1:
        return {targets[0]: body} if targets else {}
    return {path: code.strip() + "\n" for path, code in zip(parts[1::2], parts[2::2], strict=True)}


def table(patches: list[Patch]) -> str:
    """Return a Markdown table of the headers."""
    rows = ["| patch | what it does | why | changes | upstream | drop it when |", "|---|---|---|---|---|---|"]
    for patch in patches:
        changes = "<br>".join(f"`{path}`: {', '.join(names)}" for path, names in patch.symbols.items())
        cells = [patch.fields[name].replace("\n", " ") for name in ("Why", "Upstream", "Drop-When")]
        rows.append(f"| `{patch.name}` | {patch.title} | {cells[0]} | {changes} | {cells[1]} | {cells[2]} |")
    return "\n".join(rows) + "\n"
