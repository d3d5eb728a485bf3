"""Prices of GPUs, those of ``prices.yaml`` or the user's."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from dinov2_custom.errors import ConfigError
from dinov2_custom.train.gpus import GPUS

PRICES_FILE = Path(__file__).with_name("prices.yaml")


class Price(NamedTuple):
    """US dollars per hour for one GPU."""

    spot: float
    on_demand: float


def load_prices(file: str = "", given: Iterable[tuple[str, float]] = ()) -> dict[str, Price]:
    """Return a dict from GPU to price; ``given`` takes precedence over ``file``, and ``file`` over the package.

    Raises:
        ConfigError: lists every unknown GPU and every price that is not one or two numbers above 0.
    """
    prices, mistakes = {}, []
    sources = [(str(PRICES_FILE), _read(PRICES_FILE)), *([(file, _read(Path(file)))] if file else [])]
    for source, found in [*sources, ("--price", dict(given))]:
        for name, value in found.items():
            pair = value if isinstance(value, list) else [value, value]
            numbers = all(isinstance(dollars, (int, float)) and dollars > 0 for dollars in pair)
            if str(name) not in GPUS or len(pair) != 2 or not numbers:
                mistakes.append(f"{source}: {name}={value}")
            else:
                prices[str(name)] = Price(*pair)
    if mistakes:
        raise ConfigError(
            f"prices: expected GPU=DOLLARS above 0, or GPU: [SPOT, ON DEMAND] in a file, of {', '.join(GPUS)}; "
            f"got {'; '.join(mistakes)}"
        )
    return prices


def _read(path: Path) -> dict[Any, Any]:
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as e:
        raise ConfigError(f"--prices {path}: expected a YAML file of prices, got {e}") from e
    if not isinstance(found, dict):
        raise ConfigError(f"--prices {path}: expected lines such as H100: [2.25, 3.90], got {type(found).__name__}")
    return found
