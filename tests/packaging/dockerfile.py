"""Run the RUN steps of a Dockerfile without docker: ``dockerfile.py DOCKERFILE SOURCE FOLDER``.

FOLDER becomes what the image gets from SOURCE, without the files that .dockerignore leaves out, and the steps run there
with the ``pip`` and ``python`` on PATH. Base image and users are not emulated; build arguments have their defaults,
except that packages come from pip's configured index.
"""

import os
import re
import shutil
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path


def instructions(text: str) -> list[tuple[str, str]]:
    """Return (instruction, arguments) of each line, continuation lines joined."""
    text = re.sub(r"^\s*#.*\n", "", text, flags=re.MULTILINE)
    lines = re.sub(r"\\\n\s*", " ", text).splitlines()
    return [(line.split(None, 1)[0].upper(), line.split(None, 1)[1]) for line in lines if line.strip()]


def is_sent(path: str, patterns: list[str]) -> bool:
    """Return whether ``path`` is part of the build context; the last pattern that matches it or a parent decides."""
    sent = True
    parts = Path(path).parts
    for pattern in patterns:
        bare = pattern.removeprefix("!")
        names = ["/".join(parts[:count]) for count in range(1, len(parts) + 1)]
        if bare.startswith("**/"):
            bare, names = bare[3:], list(parts)
        if any(fnmatch(name, bare) for name in names):
            sent = pattern.startswith("!")
    return sent


def main(dockerfile: str, source: str, folder: str) -> None:
    ignored = Path(source, ".dockerignore").read_text().splitlines()
    patterns = [line for line in ignored if line and not line.startswith("#")]
    for file in filter(Path.is_file, Path(source).rglob("*")):
        name = file.relative_to(source)
        if is_sent(name.as_posix(), patterns):
            (Path(folder) / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(file, Path(folder) / name)
    environment = dict(os.environ)
    for instruction, arguments in instructions(Path(dockerfile).read_text()):
        if instruction in ("ARG", "ENV"):
            values = dict(re.findall(r"(\w+)=(\S*)", arguments))
            values.pop("PIP_EXTRA_INDEX_URL", None)  # torch comes from where this machine has it
            environment |= values
        elif instruction == "RUN":
            subprocess.run(["sh", "-ec", arguments], cwd=folder, env=environment, check=True, stdout=subprocess.DEVNULL)
            print(f"Dockerfile: ran {arguments}")


if __name__ == "__main__":
    main(*sys.argv[1:])
