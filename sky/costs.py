"""Estimate hours and dollars: python sky/costs.py --config-file configs/vitl.yaml --images 1000000 optim.epochs=10

Operations are counted as in the training log (``dinov2_custom/train/flops.py``). The speed of a GPU (a fraction of its
bf16 peak) and the prices are assumptions; nothing here is measured. Read :func:`report` first.
"""

from __future__ import annotations

import argparse
import sys

import torch

from dinov2_custom import entry
from dinov2_custom.cli import Parser
from dinov2_custom.configs.load import load_run_config
from dinov2_custom.errors import ConfigError
from dinov2_custom.models import build_model_from_cfg
from dinov2_custom.train.course import run_length
from dinov2_custom.train.flops import flops_per_image, peak_flops

PRICES_OF = "2026-05"  # round figures from public overviews of the large clouds
# US dollars per hour and GPU: spot, on demand. They change weekly and differ between regions; look them up with
#   sky gpus list H100:8 --all-regions
# and edit them here, or pass --price H100=2.10
PRICES = {"H100": (2.25, 3.90), "H200": (2.75, 5.50), "A100-80GB": (1.10, 2.50)}
UTILIZATION = (0.4, 0.2)  # fast and slow; published trainings of this kind are in between


def report(args: argparse.Namespace) -> int:
    """Print the table; return 0.

    Raises:
        ConfigError: a bad configuration, a price of a GPU that is not in the list, an epoch of unknown length.
    """
    if unknown := [name for name, price in args.price if name not in PRICES or price <= 0]:
        names = ", ".join(PRICES)
        raise ConfigError(f"--price: expected some of {names}, each with dollars above 0, got {', '.join(unknown)}")
    if min(args.gpus, args.images or 1) < 1:
        raise ConfigError(f"expected --gpus and --images above 0, got {args.gpus} and {args.images}")
    more = {"allow_unknown_keys": args.allow_unknown_keys, "require_dataset": False, "world_size": args.gpus}
    cfg = load_run_config(args.config_file, args.opts, **more)
    if cfg.train.max_hours:
        raise ConfigError(f"expected a run of epochs or steps, got train.max_hours={cfg.train.max_hours:g}: that is it")
    if cfg.train.OFFICIAL_EPOCH_LENGTH == "auto" and not args.images:
        raise ConfigError("train.OFFICIAL_EPOCH_LENGTH=auto: expected the number of images, got none; add --images N")
    length = run_length(cfg, args.images, args.gpus)
    drawn, operations = length.total * length.global_batch, flops_of(cfg)
    print(
        f"{args.config_file}: {length.total / length.epoch_length:g} epochs = {length.total:,} steps x "
        f"{length.global_batch:,} images = {drawn / 1e6:.2f} million images, {operations / 1e9:,.0f} GFLOP per image\n"
        f"ESTIMATES at {UTILIZATION[0]:.0%} to {UTILIZATION[1]:.0%} of the bf16 peak, no time lost to data loading; "
        f"prices of {PRICES_OF}, not checked since\n\n"
        "| GPUs | images/s | hours | spot, $ | on-demand, $ |\n|---|---|---|---|---|"
    )
    for name, prices in PRICES.items():
        rates = [args.gpus * peak_flops(name) * share / operations for share in UTILIZATION]
        hours = [drawn / rate / 3600 for rate in rates]
        given = dict(args.price).get(name)
        dollars = [[h * args.gpus * (given or price) for h in hours] for price in prices]
        cells = [_range(rates[::-1], ",.0f"), _range(hours, ",.1f"), *(_range(cost, ",.0f") for cost in dollars)]
        print(f"| {args.gpus} x {name} | {' | '.join(cells)} |")
    return 0


def flops_of(cfg) -> float:
    """Return the operations per image of a training step, computed from the sizes of the network."""
    with torch.device("meta"):
        backbone, width = build_model_from_cfg(cfg, only_teacher=True)
    return flops_per_image(cfg, width, backbone.n_blocks)


def _range(pair: list[float], form: str) -> str:
    return " - ".join(f"{value:{form}}" for value in pair)


def _price(text: str) -> tuple[str, float]:
    name, _, value = text.partition("=")
    try:
        return name, float(value)
    except ValueError as e:
        raise argparse.ArgumentTypeError(f"expected GPU=DOLLARS, such as H100=2.10, got {text!r}") from e


def main() -> int:
    """Parse the command line and report; return the exit code."""
    parser = Parser(prog="python sky/costs.py", description="Estimate hours and dollars; measures nothing.")
    parser.add_argument("--config-file", required=True, metavar="FILE")
    parser.add_argument("--images", type=int, metavar="N", help="number of images; needed if an epoch is one pass")
    parser.add_argument("--gpus", type=int, default=8, metavar="N", help="GPUs of all nodes together")
    given = {"type": _price, "action": "append", "default": [], "metavar": "GPU=DOLLARS"}
    parser.add_argument("--price", **given, help="price per hour of one GPU; can be repeated for other GPUs")
    parser.add_argument("--allow-unknown-keys", action="store_true", help="ignore keys of a fork's YAML file")
    parser.add_argument("opts", nargs="*", metavar="key=value", help="e.g. optim.global_batch=1024 optim.epochs=10")
    args = parser.parse_intermixed_args()
    return entry.reported(lambda: report(args))


if __name__ == "__main__":
    sys.exit(main())
