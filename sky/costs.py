"""Estimate hours and dollars of ten epochs: python sky/costs.py --config-file configs/vitl.yaml --images 1000000

Floating-point operations are counted from the configuration; how fast a GPU gets through them is an assumption (a share
of its bf16 peak), prices come from ``sky/prices.yaml``. Nothing here is measured. Read :func:`gflop_per_image` first.
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path

import yaml

from dinov2_custom import entry
from dinov2_custom.commands import Parser
from dinov2_custom.configs.archs import DEPTH_OF_ARCH, plain_arch_name
from dinov2_custom.configs.load import load_run_config
from dinov2_custom.errors import ConfigError

HERE = Path(__file__).resolve().parent
WIDTH = {"nano": 64, "micro": 128, "tiny": 192, "small": 384, "base": 768, "large": 1024, "giant2": 1536}
UTILIZATION = (0.2, 0.4)  # slow and fast; published runs of this kind of training are between


def gflop_per_image(cfg) -> float:
    """Return the billions of operations of one image in one step: both networks, all crops, forward and backward.

    A multiply-add is two. The student's backward pass costs two forward passes; samples that drop a residual branch
    skip its work. Normalization, softmax, optimizer and the averaging of the teacher are left out: a few per cent.
    """
    student, crops, patch = cfg.student, cfg.crops, cfg.student.patch_size
    extra = 1 + student.num_register_tokens
    patches = (crops.global_crops_size // patch) ** 2
    local_patches = (crops.local_crops_size // patch) ** 2
    kept = 1 - student.drop_path_rate * (1 if student.drop_path_uniform else 0.5)

    def backbone(share: float, crop_patches: int) -> float:
        return _backbone(cfg, crop_patches, crop_patches + extra, share)

    # heads: rows of the class tokens, and of the masked patches of both global crops
    ibot = cfg.ibot if cfg.ibot.separate_head else cfg.dino
    masked = 2 * patches * cfg.ibot.mask_sample_probability * sum(cfg.ibot.mask_ratio_min_max) / 2
    masked *= cfg.ibot.loss_weight > 0
    width = WIDTH[plain_arch_name(student.arch).removeprefix("vit_")]
    class_head, patch_head = _head(cfg.dino, width), _head(ibot, width)
    teacher = 2 * backbone(1, patches) + 2 * class_head + masked * patch_head
    forward = 2 * backbone(kept, patches) + crops.local_crops_number * backbone(kept, local_patches)
    forward += (2 + crops.local_crops_number) * class_head + masked * patch_head
    return (teacher + 3 * forward) / 1e9


def _backbone(cfg, patches: int, tokens: int, share: float) -> float:
    arch = plain_arch_name(cfg.student.arch)
    width, depth = WIDTH[arch.removeprefix("vit_")], DEPTH_OF_ARCH[arch]
    if "swiglu" in cfg.student.ffn_layer:
        ffn = 3 * width * -(-int(4 * width * 2 / 3) // 8) * 8
    else:
        ffn = 0 if cfg.student.ffn_layer == "identity" else 8 * width * width
    block = tokens * (4 * width * width + ffn) + 2 * tokens * tokens * width
    return 2 * (depth * block * share + patches * 3 * cfg.student.patch_size**2 * width)


def _head(head, width: int) -> float:
    widths = [
        width,
        *[head.head_hidden_dim] * (head.head_nlayers - 1),
        head.head_bottleneck_dim,
        head.head_n_prototypes,
    ]
    return 2 * sum(a * b for a, b in zip(widths, widths[1:], strict=False))


def images_of(cfg, epochs: float, global_batch: int, images: int | None) -> int:
    """Return how many images ``epochs`` epochs draw.

    Raises:
        ConfigError: an epoch is one pass over the data, and their number is not given.
    """
    length = cfg.train.OFFICIAL_EPOCH_LENGTH
    if length == "auto":
        if not images:
            raise ConfigError(
                "train.OFFICIAL_EPOCH_LENGTH=auto makes an epoch one pass over your images: expected their number, got "
                "none; add --images N"
            )
        length = math.ceil(images / global_batch)
    return round(epochs * length) * global_batch


def table(cfg, args: argparse.Namespace) -> list[str]:
    """Return the report, a line each.

    Raises:
        ConfigError: a price of a GPU that is not in the list, and what :func:`images_of` refuses.
    """
    prices = yaml.safe_load((HERE / "prices.yaml").read_text())
    unknown = sorted(set(args.price) - set(prices["gpus"]))
    if unknown:
        raise ConfigError(f"--price: expected some of {', '.join(prices['gpus'])}, got {', '.join(unknown)}")
    drawn, gflop = images_of(cfg, args.epochs, args.global_batch, args.images), gflop_per_image(cfg)
    lines = [
        f"{args.config_file}: {args.epochs:g} epochs = {drawn // args.global_batch:,} steps x {args.global_batch:,} "
        f"images = {drawn / 1e6:.2f} million images, {gflop:,.0f} GFLOP an image",
        f"ESTIMATES at {UTILIZATION[1]:.0%} to {UTILIZATION[0]:.0%} of the bf16 peak, data loading never the limit; "
        f"prices of {prices['prices_of']}, not checked since: see sky/prices.yaml",
        "",
        "| GPUs | images/s | hours | spot, $ | on-demand, $ |",
        "|---|---|---|---|---|",
    ]
    for name, gpu in prices["gpus"].items():
        price = {**gpu, **args.price.get(name, {})}
        rates = [args.gpus * gpu["bf16_tflops"] * 1e3 * share / gflop for share in UTILIZATION[::-1]]
        hours = [drawn / rate / 3600 for rate in rates]
        spot, on_demand = ([h * args.gpus * price[kind] for h in hours] for kind in ("spot", "on_demand"))
        cells = [_range(values) for values in (rates[::-1], hours, spot, on_demand)]
        lines.append(f"| {args.gpus} x {name} | {' | '.join(cells)} |")
    return lines


def _range(values: list[float]) -> str:
    return " - ".join(f"{value:,.0f}" if value >= 10 else f"{value:.2g}" for value in values)


def _price(text: str) -> tuple[str, float]:
    name, _, value = text.partition("=")
    try:
        return name, float(value)
    except ValueError as e:
        raise argparse.ArgumentTypeError(f"expected GPU=DOLLARS, such as H100=2.10, got {text!r}") from e


def main(arguments: list[str] | None = None) -> int:
    """Print the estimate, or one line of error; return the exit code."""
    parser = Parser(
        prog="python sky/costs.py", description="Estimate hours and dollars from the configuration; measures nothing."
    )
    parser.add_argument("--config-file", required=True, metavar="FILE")
    parser.add_argument("--images", type=int, metavar="N", help="images you have, where an epoch is one pass over them")
    parser.add_argument("--epochs", type=float, default=10, metavar="N")
    parser.add_argument("--gpus", type=int, default=8, metavar="N", help="of all nodes together")
    parser.add_argument(
        "--global-batch", type=int, default=1024, metavar="N", help="images a step, of all GPUs together"
    )
    parser.add_argument("--price", type=_price, nargs="*", default=[], metavar="GPU=DOLLARS", help="an hour of one GPU")
    parser.add_argument("--allow-unknown-keys", action="store_true", help="of a fork's YAML file: leave them out")
    parser.add_argument("opts", nargs="*", metavar="key=value", help="overrides of the configuration")
    args = parser.parse_intermixed_args(arguments)
    args.price = {name: {"spot": value, "on_demand": value} for name, value in args.price}
    return entry.reported(lambda: _report(args))


def _report(args: argparse.Namespace) -> int:
    numbers = {name: getattr(args, name) for name in ("images", "epochs", "gpus", "global_batch")}
    wrong = [f"--{name.replace('_', '-')} {n}" for name, n in numbers.items() if n is not None and not n > 0]
    wrong += [f"--price {name}={price['spot']:g}" for name, price in args.price.items() if not price["spot"] > 0]
    if wrong:
        raise ConfigError(f"expected positive numbers, got {', '.join(wrong)}")
    cfg = load_run_config(
        args.config_file, args.opts, allow_unknown_keys=args.allow_unknown_keys, require_dataset=False
    )
    print("\n".join(table(cfg, args)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
