"""Write what the quickstart measured and drew into one HTML file, which needs no other file and no network."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import NamedTuple

from dinov2_custom.eval.neighbours import NEIGHBOURS
from dinov2_custom.plots.history import PANELS, draw_history
from dinov2_custom.plots.metrics_file import Run
from dinov2_custom.plots.page import html_config, html_page, html_picture, html_svg, html_table
from dinov2_custom.quickstart.measure import Measurement

CURVES = ("kNN accuracy", "DINO loss", "Teacher's assignments")
FIELDS = {"raw pixels": "raw_pixels", "untrained network": "untrained", "trained teacher": "trained"}


class Pictures(NamedTuple):
    """PNG files of the first seed, and the share of three principal components in the variance of each network."""

    neighbours: Path
    features: Path
    shares: Mapping[str, float]


def make_report(
    results: Mapping[int, Measurement],
    runs: Sequence[Run],
    counts: Mapping[str, Mapping[str, int]],
    pictures: Pictures,
    commands: Mapping[str, str],
) -> str:
    """Return the HTML page.

    Args:
        results, runs: by seed, and in the same order.
        counts: number of tiles by set and photograph.
        commands: what to run next, by description.
    """
    train, held_out = (sum(counts[part].values()) for part in ("train", "held_out"))
    photos = len(counts["train"])
    means = {label: statistics.mean(getattr(r, field) for r in results.values()) for label, field in FIELDS.items()}
    raw, untrained, trained = means.values()
    last = runs[0].rows[-1]
    alarms = [f"Seed {seed} collapsed: {r.collapse}." for seed, r in results.items() if r.collapse]
    return html_page(
        "DINOv2 quickstart: what training without labels changed",
        [
            *(f"<p><strong>{escape(alarm)}</strong></p>" for alarm in alarms),
            f"<p>A vision transformer was trained on {train:,} grey tiles of {photos} photographs without being given "
            f"any label, for {last['iteration'] + 1:,} iterations ({last['epoch']:.0f} passes over the tiles). Then "
            f"{held_out:,} tiles from other parts of the photographs were classified by the photograph that they come "
            f"from, by their {NEIGHBOURS} nearest neighbours among the training tiles. By raw pixels {raw:.0%} are "
            f"right, by the features of the network before training {untrained:.0%}, and "
            f"<strong>after training {trained:.0%}</strong>.</p>",
            html_table(
                ["kNN accuracy", *(f"seed {seed}" for seed in results), *(["mean"] if len(results) > 1 else [])],
                (
                    [label, *(f"{getattr(r, field):.3f}" for r in results.values())]
                    + ([f"{means[label]:.3f}"] if len(results) > 1 else [])
                    for label, field in FIELDS.items()
                ),
            ),
            "<h2>Nearest neighbours</h2>",
            "<p>Held-out tiles and the training tiles most similar to them. Green: of the same photograph. Orange with "
            "a cross: of another. The held-out tiles were chosen so that the counts are typical: close to the shares "
            "over all held-out tiles.</p>",
            html_picture(pictures.neighbours, "Nearest neighbours of held-out tiles by each network"),
            "<h2>Features of whole photographs</h2>",
            "<p>Each network saw a window around each point. The principal components of its features are shown "
            "three at a time as red, green and blue, all on the scale of the first; the percentage is their share of "
            "the variance. Equal colours in a row mean similar features, also across photographs. Three components "
            "hold "
            + " and ".join(f"{share:.0%} of the variance ({name})" for name, share in pictures.shares.items())
            + ": where they hold nearly all, there is little else by which tiles could be distinguished.</p>",
            html_picture(pictures.features, "Photographs, and their features by each network as colours"),
            "<h2>During training</h2>",
            "<p>kNN accuracy as evaluated during the run, with the values of the untrained network and of raw pixels "
            "as lines; the loss; and the entropies of the teacher's assignments to prototypes. A network with the same "
            "output for every image would have the loss and the entropies at ln(prototypes).</p>",
            html_svg(draw_history(runs, [panel for panel in PANELS if panel.title in CURVES])),
            "<h2>Next</h2>",
            *(f"<p>{escape(text.capitalize())}:</p><pre>{escape(line)}</pre>" for text, line in commands.items()),
            *(html_config(run) for run in runs[:1]),
        ],
    )
