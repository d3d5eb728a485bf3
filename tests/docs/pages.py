"""The commands that README, docs/, sky/, patches/ and the headers of the recipes show."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

REPOSITORY = Path(__file__).resolve().parents[2]
PAGES = ("README.md", "CONTRIBUTING.md", "docs/*.md", "sky/*.md", "patches/*.md", "configs/**/*.yaml", "sky/*.yaml")
PROGRAMS = ("python", "make", "pip", "torchrun", "sky", "dinov2-custom")
# what a page writes for the reader to fill in, with a value of the right kind; "..." stands for arguments shown before
PLACEHOLDERS = {
    "<it>": "9999",
    "<checkout>": "checkout",
    "<wheel>": "dinov2_custom.whl",
    "hf|timm|torch|onnx|safetensors": "hf",
    "--nproc_per_node=N": "--nproc_per_node=2",
}


class Shown(NamedTuple):
    """A command on a page; ``is_block``: in a code block, not within a sentence."""

    page: str
    words: list[str]
    is_block: bool

    def __str__(self) -> str:
        return f"{self.page}: {shlex.join(self.words)}"


def commands() -> list[Shown]:
    """Return all commands that start with one of ``PROGRAMS``, with placeholders filled in."""
    pages = sorted(path for pattern in PAGES for path in REPOSITORY.glob(pattern))
    return [Shown(str(page.relative_to(REPOSITORY)), *found) for page in pages for found in _commands(page)]


def _commands(page: Path) -> Iterator[tuple[list[str], bool]]:
    text = page.read_text()
    if page.suffix == ".yaml":
        blocks = ["\n".join(line.lstrip("# ") if line.startswith("#") else "" for line in text.splitlines())]
        inline = []
    else:
        blocks = re.findall(r"^```(?:|bash|sh|console)\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)
        inline = re.findall(r"(?<!`)`([^`]+)`", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE))
    for block in blocks:
        for line in re.sub(r"\\\n\s*", " ", block).splitlines():
            for part in line.split(" && "):
                yield from ((words, True) for words in _words(part))
    for code in inline:
        yield from ((words, False) for words in _words(" ".join(code.split())))


def _words(line: str) -> Iterator[list[str]]:
    if line.split(" ")[0] not in PROGRAMS or " " not in line:
        return
    for placeholder, value in PLACEHOLDERS.items():
        line = line.replace(placeholder, value)
    yield [word for word in shlex.split(line.replace("$USER", "me"), comments=True) if word != "..."]
