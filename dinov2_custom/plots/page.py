"""Create HTML files that contain their figures and load no external scripts, fonts or images.

``make_page`` has the panels of runs, their latest numbers and the differences between their configurations; the
functions before it make any page.
"""

from __future__ import annotations

import base64
import io
import statistics
from collections.abc import Callable, Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

import yaml

from dinov2_custom.plots.metrics_file import Run

_STYLE = """
body { font: 14px/1.45 system-ui, sans-serif; margin: 1.5em auto; max-width: 1500px; padding: 0 1em; color: #222; }
h1 { font-size: 1.4em; } h2 { font-size: 1.1em; margin-top: 1.6em; }
table { border-collapse: collapse; } th, td { padding: .25em .8em; border-bottom: 1px solid #ddd; text-align: right; }
th:first-child, td:first-child { text-align: left; } thead th { border-bottom: 2px solid #888; }
svg { width: 100%; height: auto; } pre { background: #f6f6f6; padding: 1em; overflow: auto; }
p { max-width: 60em; } img { max-width: 100%; }
"""
_NOT_SETTINGS = ("train.output_dir", "wandb.name", "wandb.id", "mlflow.name", "mlflow.id")


def html_page(title: str, parts: Iterable[str]) -> str:
    """Return a page with ``title``, which is text, as its first heading, above ``parts``, which are HTML."""
    head = f'<meta charset="utf-8"><title>{escape(title)}</title><style>{_STYLE}</style>'
    body = "\n".join([f"<h1>{escape(title)}</h1>", *parts])
    return f'<!DOCTYPE html>\n<html lang="en"><head>{head}</head>\n<body>\n{body}\n</body></html>\n'


def html_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table of text."""
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    body = "\n".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table>"


def html_svg(figure: Any) -> str:
    """Return a matplotlib figure as an SVG element, without XML declaration and date."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def html_picture(path: Path, description: str) -> str:
    """Return the PNG file at ``path`` as an image element that contains it."""
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<img alt="{escape(description)}" src="data:image/png;base64,{data}">'


def html_config(run: Run) -> str:
    """Return the configuration of ``run``, folded."""
    text = escape(yaml.safe_dump(run.config, sort_keys=False))
    return f"<details><summary>Configuration of {escape(run.name)}</summary><pre>{text}</pre></details>"


def make_page(runs: Sequence[Run], figure: Any, sentences: Sequence[str] = ()) -> str:
    """Return the HTML page, with ``figure`` embedded as SVG below the ``sentences``."""
    parts = [
        html_table(["run", *(label for label, _ in _FACTS)], ([run.name, *_facts(run)] for run in runs)),
        *(f"<p>{escape(sentence)}</p>" for sentence in sentences),
        html_svg(figure),
    ]
    if len(runs) > 1 and (differences := config_differences(runs)):
        parts += ["<h2>Settings that differ</h2>", html_table(["key", *(run.name for run in runs)], differences)]
    parts += [html_config(run) for run in runs if run.config]
    return html_page(runs[0].name if len(runs) == 1 else f"{len(runs)} runs", parts)


def config_differences(runs: Sequence[Run]) -> list[list[str]]:
    """Return the key and its value in each run, for the keys whose values differ between runs."""
    flat = [_flat(run.config) for run in runs]
    keys = dict.fromkeys(key for one in flat for key in one if key not in _NOT_SETTINGS)
    rows = [[key, *(str(one.get(key, "")) for one in flat)] for key in keys]
    return [row for row in rows if len(set(row[1:])) > 1]


def _flat(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found = {}
    for key, value in config.items():
        found |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found


def _last(key: str) -> Callable[[Run], float | None]:
    return lambda run: run.rows[-1].get(key)


def _over_rows(
    key: str, statistic: Callable[[list[float]], float], factor: float = 1.0
) -> Callable[[Run], float | None]:
    def value(run: Run) -> float | None:
        numbers = [row[key] for row in run.rows if row.get(key) is not None]
        return statistic(numbers) * factor if numbers else None

    return value


_FACTS: tuple[tuple[str, Callable[[Run], float | None]], ...] = (
    ("iteration", _last("iteration")),
    ("total loss", _last("total_loss")),
    ("local DINO", _last("dino_local_crops_loss")),
    ("global DINO", _last("dino_global_crops_loss")),
    ("iBOT, half", _last("ibot_loss")),
    ("teacher entropy", _last("teacher_entropy")),
    ("learning rate", _last("lr")),
    ("images/s, median", _over_rows("images_per_s", statistics.median)),
    ("waiting for data, median %", _over_rows("data_wait", statistics.median, 100)),
    ("peak memory, GiB", _over_rows("memory_mib", max, 1 / 1024)),
)


def _facts(run: Run) -> list[str]:
    values = [value(run) for _, value in _FACTS]
    return ["" if v is None else f"{v:,}" if isinstance(v, int) else f"{v:.4g}" for v in values]
