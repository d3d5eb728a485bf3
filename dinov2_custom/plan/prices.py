"""Prices of GPUs, those of ``prices.yaml`` or the user's."""

from __future__ import annotations

import math
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


def find_by_user_name(text: str) -> str:
    """Return the key of ``GPUS`` for what a user or SkyPilot writes: a100-80gb, RTX4090, "RTX 4090".

    Raises:
        ConfigError: no GPU has this name.
    """
    plain = text.upper().replace("RTX", "").replace("_", "-").strip(" -")
    found = [key for key in GPUS if key.upper() == plain]
    if not found:
        raise ConfigError(f"--gpu {text}: expected one of {', '.join(GPUS)}")
    return found[0]


def load_prices(file: str = "", given: Iterable[tuple[str, float]] = ()) -> dict[str, Price]:
    """Return a dict from GPU to price; ``given`` takes precedence over ``file``, and ``file`` over the package.

    Names are those that :func:`find_by_user_name` accepts.

    Raises:
        ConfigError: lists every unknown GPU and every price that is not one number above 0, or two that do not fall.
    """
    prices, mistakes = {}, []
    sources = [(str(PRICES_FILE), _read(PRICES_FILE)), *([(file, _read(Path(file)))] if file else [])]
    for source, found in [*sources, ("--price", dict(given))]:
        for name, value in found.items():
            pair = value if isinstance(value, list) else [value, value]
            numbers = all(type(dollars) in (int, float) and 0 < dollars < math.inf for dollars in pair)  # no bool
            try:
                gpu = find_by_user_name(str(name))
            except ConfigError:
                gpu = ""
            if not gpu or len(pair) != 2 or not numbers or pair[0] > pair[1]:
                mistakes.append(f"{source}: {name}={value}")
            else:
                prices[gpu] = Price(*pair)
    if mistakes:
        raise ConfigError(
            "prices: expected GPU=DOLLARS above 0, or GPU: [SPOT, ON DEMAND] in a file with SPOT at most ON DEMAND, of "
            f"{', '.join(GPUS)}; got {'; '.join(mistakes)}"
        )
    return prices


def _read(path: Path) -> dict[Any, Any]:
    expected = f"--prices {path}: expected a YAML file of lines such as H100: [2.25, 3.90], got"
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as e:
        raise ConfigError(f"{expected} {e.strerror}; check the path") from e
    except (yaml.YAMLError, UnicodeDecodeError) as e:
        raise ConfigError(f"{expected} something else") from e
    if not isinstance(found, dict):
        raise ConfigError(f"{expected} {'nothing' if found is None else type(found).__name__}")
    return found
