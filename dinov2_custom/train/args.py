"""Parse the command line of a training run: flags and `key=value` overrides in any order.

Not the meaning of the overrides (configs/load.py). Imports neither torch nor omegaconf, so that --help is instant. Read
`get_args_parser` first.
"""

import argparse
import difflib
import sys
from collections.abc import Sequence
from typing import Any

from dinov2_custom.commands import Parser, command, list_of_keys, small_recipe

_DESCRIPTION = "Train DINOv2 on a folder of unlabeled images."
_EPILOG = """\
examples:
  train a ViT-S on your own images:
    {train} --output-dir out train.dataset_path=/my/images
  a short run on a CPU, continued if the output directory has a checkpoint:
    {train} train.dataset_path=/my/images --output-dir out \\
        optim.epochs=2 optim.warmup_epochs=0.2 optim.freeze_last_layer_epochs=0 train.batch_size_per_gpu=8

all keys: {keys}
"""


class OverridesParser(Parser):
    """An ArgumentParser whose positional `opts` may stand before, between and after the flags.

    Flags are not abbreviated. Arguments that are neither a flag nor key=value end in one error that names them all.
    A parser made with parents=[...] must be of this class too.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("allow_abbrev", False)
        kwargs.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(*args, **kwargs)

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """Parse as argparse does, then move the overrides it left over to `opts`, in order."""
        namespace, extras = super().parse_known_args(args, namespace)
        unknown = [text for text in extras if text.startswith("-") and text != "--"]
        if hasattr(namespace, "opts"):
            overrides = [text for text in extras if not text.startswith("-")]
            namespace.opts = [*(namespace.opts or []), *overrides]
            extras = unknown
        return namespace, extras

    def parse_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> argparse.Namespace:
        """Parse and check; on mistakes print all of them, and exit with status 2."""
        arguments = list(sys.argv[1:] if args is None else args)
        namespace, unknown = self.parse_known_args(arguments, namespace)
        problems = [self._explain_flag(text) for text in unknown]
        bad = [text for text in getattr(namespace, "opts", []) if not _is_override(text)]
        bare = [flag for flag in unknown if "=" not in flag]
        their_values = {after for flag, after in zip(arguments, arguments[1:], strict=False) if flag in bare}
        problems += [_explain_override(text) for text in bad if text not in their_values]
        if problems:
            self.error("\n  ".join(["cannot understand these arguments:", *problems]))
        if getattr(namespace, "eval", ""):
            print(f"{self.prog}: note: --eval is accepted for upstream's sake and not used", file=sys.stderr)
        return namespace

    def _explain_flag(self, text: str) -> str:
        flag = text.split("=", 1)[0]
        if "." in flag:
            return f"{text}: expected a flag -> an override is written without dashes: {text.lstrip('-')}"
        flags = [name.lstrip("-") for action in self._actions for name in action.option_strings]
        near = difflib.get_close_matches(flag.lstrip("-"), [name for name in flags if len(name) > 1], n=1, cutoff=0.65)
        return f"{text}: unknown flag -> " + (f"did you mean --{near[0]}?" if near else "--help lists the flags")


def get_args_parser(add_help: bool = True) -> OverridesParser:
    """Return the parser of a training run; with add_help=False it serves as a parent of other parsers."""
    train = f"{command('run/train/train.py')} {small_recipe()}"
    epilog = _EPILOG.format(train=train, keys=list_of_keys())
    parser = OverridesParser(description=_DESCRIPTION, epilog=epilog, add_help=add_help)
    _add_configuration(parser, "optim.epochs=10, anywhere")
    parser.add_argument(
        "--output-dir",
        "--output_dir",
        default="",
        type=str,
        metavar="DIR",
        help="where everything of the run goes (default: train.output_dir, else ./outputs/<date>_<time>)",
    )
    parser.add_argument(
        "--no-resume", action="store_true", help="start anew, even if the output directory has a checkpoint"
    )
    parser.add_argument(
        "--eval-only", action="store_true", help="write the teacher of the newest checkpoint, without training"
    )
    parser.add_argument("--eval", type=str, default="", metavar="STR", help="accepted as upstream does, not used")
    return parser


def get_memory_args_parser() -> OverridesParser:
    """Return the parser of ``run/train/memory.py``."""
    parser = OverridesParser(
        prog=command("run/train/memory.py"),
        description="Count the memory of a training step, on tensors without data; no GPU is needed.",
        epilog=f"example: {command('run/train/memory.py')} {small_recipe()} --fits 40",
    )
    _add_configuration(parser, "train.batch_size_per_gpu=32")
    parser.add_argument(
        "--fits",
        type=float,
        default=0.0,
        metavar="GB",
        help="also find the largest batch for a GPU of so many GB (10^9)",
    )
    parser.add_argument(
        "--ngpus", type=int, default=1, metavar="N", help="also estimate the step with weights sharded over N GPUs"
    )
    return parser


def _add_configuration(parser: OverridesParser, such_as: str) -> None:
    parser.add_argument("--config-file", default="", metavar="FILE", help="YAML file that overrides the defaults")
    parser.add_argument(
        "--allow-unknown-keys", action="store_true", help="warn about unknown configuration keys instead of refusing"
    )
    parser.add_argument("opts", nargs="*", default=[], metavar="key=value", help=f"overrides such as {such_as}")


def _is_override(text: str) -> bool:
    return "=" in text and not text.startswith("=")


def _explain_override(text: str) -> str:
    from dinov2_custom.configs.checks import explain_bad_override

    return f"{text}: expected key=value -> {explain_bad_override(text)}"
