"""Command line of the quickstart, without torch, so that --help is instant. Read :func:`get_args_parser` first."""

from __future__ import annotations

from dinov2_custom.train.args import OverridesParser


def get_args_parser(config_file: str = "configs/small.yaml") -> OverridesParser:
    """Return the parser; ``config_file`` is the recipe that is trained by default."""
    parser = OverridesParser(
        description="Train DINOv2 for a few minutes on tiles of real photographs and show what it has learned."
    )
    parser.add_argument("--config-file", default=config_file, metavar="FILE", help="recipe (default: %(default)s)")
    parser.add_argument(
        "--output-dir",
        "--output_dir",
        default="outputs/quickstart",
        metavar="DIR",
        help="where everything goes; a finished run there is only measured again (default: %(default)s)",
    )
    parser.add_argument(
        "--seeds", type=_numbers, default=[0], metavar="N[,N]", help="train once for each seed (default: 0)"
    )
    parser.add_argument("--no-resume", action="store_true", help="train anew, even if there is a finished run")
    parser.add_argument(
        "--allow-unknown-keys", action="store_true", help="warn about unknown configuration keys instead of refusing"
    )
    parser.add_argument("opts", nargs="*", default=[], metavar="key=value", help="overrides of the recipe, anywhere")
    return parser


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]
