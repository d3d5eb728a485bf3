"""What a user can type from where they are: the scripts of a checkout, or without one the same as modules. Torch-free.

Every hint and ``--help`` takes its commands from here, and every script its :class:`Parser`. Read :func:`command`.
"""

from __future__ import annotations

import argparse
import difflib
import sys
from pathlib import Path
from typing import NoReturn

MODULES = {
    "run/train/train.py": "run.train.train",
    "run/train/memory.py": "train.memory",
    "run/data/verify.py": "verify",
    "run/data/prepare.py": "prepare",
    "run/eval/knn.py": "run.eval.knn",
    "run/eval/linear.py": "run.eval.linear",
    "run/eval/log_regression.py": "run.eval.log_regression",
    "run/embed.py": "embed",
    "run/export/export.py": "export",
    "run/plots/history.py": "plots.history",
    "run/plots/features.py": "plots.look",
}


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that answers a mistake with the mistake and where help is, not with all its flags."""

    def error(self, message: str) -> NoReturn:
        """Print ``message`` with the nearest flag, and how to get help; exit with 2, as argparse does."""
        unknown = [word.partition("=")[0] for word in message.split() if word.startswith("--")]
        if message.startswith("unrecognized arguments") and unknown:
            flags = self._option_string_actions
            shown = [f for f in flags if "_" not in f or f.replace("_", "-") not in flags]  # not a flag's second form
            near = difflib.get_close_matches(unknown[0], shown, n=1)
            message += f" -> did you mean {near[0]}?" if near else ""
        print(f"error: {message}\nhelp: {self.prog} --help", file=sys.stderr)
        raise SystemExit(2)


def command(script: str) -> str:
    """Return what starts ``script``, a key of ``MODULES``: itself where the current directory has it, else its module.

    Both take the same arguments.
    """
    return f"python {script}" if Path(script).is_file() else f"python -m dinov2_custom.{MODULES[script]}"


def small_recipe(recipe: str = "configs/vits.yaml") -> str:
    """Return the argument that chooses ``recipe`` where the current directory has it, else the key for a ViT-S."""
    return f"--config-file {recipe}" if Path(recipe).is_file() else "student.arch=vit_small"


def list_of_keys() -> str:
    """Return where all configuration keys are explained: the page, or the command that prints it."""
    page = "docs/configuration.md"
    return page if Path(page).is_file() else "`python -m dinov2_custom.configs.document`"
