"""Extrapolate a metric of a run: the best of four families by held-back error, a band by residual bootstrap."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from dinov2_custom.utils.rng import seed_for

MIN_POINTS = 12
MAX_POINTS = 60  # more are averaged in groups: a fit does not need them, and means are less correlated
RESAMPLES = 200
PLAUSIBLE = 5  # families with at most this multiple of the least held-back error widen the band
LEAST_EXPLAINED = (
    0.5  # of the variance; all families are monotone, so this is low for a curve that turns or only scatters
)
EXPONENTS = np.geomspace(0.05, 3, 80)
RATES = np.geomspace(0.5, 50, 120)  # per length of the run
FAMILIES = ("a + b x^-c", "a + b ln x", "a + b e^-cx", "ln y = a + b ln x")
BAND = (5, 95)  # per cent of the resamples: 10 and 90 leave out what the choice of family and of its exponent adds


class Forecast(NamedTuple):
    """An extrapolation.

    Attributes:
        family: one of ``FAMILIES``.
        x: iterations, from the metric's last one to the last one of the forecast, float64 (n,).
        y: the fitted curve there, float64 (n,).
        low, high: the band in which the curve (not each noisy row) is expected, float64 (n,).
        change: rise of the curve from the end of the run; ``change_low`` and ``change_high`` are its band.
    """

    family: str
    x: np.ndarray
    y: np.ndarray
    low: np.ndarray
    high: np.ndarray
    change: float
    change_low: float
    change_high: float


def make_forecast(
    x: np.ndarray, y: np.ndarray, until: float, seed: int = 0, since: float | None = None
) -> Forecast | str:
    """Fit the points and extrapolate them; return a reason instead if they do not allow it.

    Each family is fitted to the first two thirds and the one that predicts the last third best is fitted to all points.
    For the band, residuals are drawn with replacement, added to the fitted curve and fitted again by every family that
    predicted the last third about as well: the families differ more from each other than their own fits scatter.

    Args:
        x: increasing iterations from 0, float64 (n,), without the warm-up, whose curve is another one.
        y: finite values, float64 (n,).
        until: iteration to extrapolate to.
        since: last iteration of the run, where the change starts; by default the last of ``x``.
    """
    if x.size < MIN_POINTS:
        return f"it has {x.size} points after the warm-up, a forecast needs {MIN_POINTS}"
    if np.ptp(y) == 0:
        return "all its values are equal"
    last = x[-1]
    groups = np.array_split(np.arange(x.size), min(x.size, MAX_POINTS))
    x, y = (np.array([values[group].mean() for group in groups]) for values in (x, y))
    split = _split(x)
    future = np.append(np.linspace(last, until, 50), last if since is None else since)  # the start of the change last

    def position(iterations: np.ndarray) -> np.ndarray:
        return (iterations + 1) / (last + 1)

    families = range(4 if (y > 0).all() else 3)
    early = [FITS[n](position(x[:split]), y[:split, None], position(x[split:]))[:, 0] for n in families]
    errors = [float(np.sqrt(((curve - y[split:]) ** 2).mean())) for curve in early]
    best = int(np.argmin(errors))
    fitted = FITS[best](position(x), y[:, None], position(np.concatenate([x, future])))[:, 0]
    residuals = y - fitted[: x.size]
    if (explained := 1 - residuals.var() / y.var()) < LEAST_EXPLAINED:
        return (
            f"it does not rise or fall steadily: the best of four monotone curves explains {max(explained, 0):.0%} "
            f"of its variance, a forecast needs {LEAST_EXPLAINED:.0%}"
        )
    no_change = np.sqrt(((y[split:] - y[split - max(split // 4, 1) : split].mean()) ** 2).mean())
    if errors[best] > max(no_change, 2 * residuals.std()):
        return "its last third departs from the curve of the first two thirds more than from no change at all"
    generator = np.random.default_rng(seed_for(seed, "forecast"))
    residuals = _widened(residuals)
    samples = fitted[: x.size, None] + residuals[generator.integers(0, x.size, (x.size, RESAMPLES))]
    lowest, bands, changes = y.min(), [], []
    for family, error in enumerate(errors):
        if error <= PLAUSIBLE * errors[best]:
            values = np.maximum(samples, lowest / 10) if family == 3 else samples  # whose logarithm is fitted
            sampled = FITS[family](position(x), values, position(future))
            bands.append(np.percentile(sampled[:-1], BAND, axis=1))
            changes.append(np.percentile(sampled[-2] - sampled[-1], BAND))
    low, high = np.min([band[0] for band in bands], axis=0), np.max([band[1] for band in bands], axis=0)
    y = fitted[x.size : -1]
    change = float(y[-1] - fitted[-1])
    change_low, change_high = min(c[0] for c in changes), max(c[1] for c in changes)
    return Forecast(FAMILIES[best], future[:-1], y, low, high, change, float(change_low), float(change_high))


def _split(x: np.ndarray) -> int:
    """Return the number of points in the first two thirds of the iterations, at least four on each side."""
    return int(np.clip(np.searchsorted(x, x[0] + (x[-1] - x[0]) * 2 / 3), 4, x.size - 4))


def _widened(residuals: np.ndarray) -> np.ndarray:
    """Return the residuals of a fit, centred, and scaled to what the noise does to a fit.

    Values whose neighbours have correlation r vary slowly: n of them are worth m = n (1 - r) / (1 + r) independent
    ones. Independent draws with n / m times the variance vary as much when fitted. The curve with three parameters has
    taken its part of the noise, which leaves about m / (m + 3) of the variance and an estimate of r that is too low by
    (3 + 5 r) / n; both were checked by simulation.
    """
    n = residuals.size
    residuals = residuals - residuals.mean()
    correlation = residuals[:-1] @ residuals[1:] / max(float(residuals @ residuals), 1e-300)
    r = float(np.clip((n * correlation + 3) / (n - 5), 0, 0.95))
    m = n * (1 - r) / (1 + r)
    return residuals * np.sqrt(n * (m + 3)) / m


def _best_line(g: np.ndarray, y: np.ndarray, g_at: np.ndarray) -> np.ndarray:
    """Fit y (n, B) by a + b g_c with the best c for each column; no starting values, and no failures to converge.

    Args:
        g, g_at: the functions g_c at the points, (C, n), and where the fit is wanted, (C, m).

    Returns:
        the fitted values, (m, B).
    """
    mean = g.mean(axis=1, keepdims=True)
    squares = ((g - mean) ** 2).sum(axis=1, keepdims=True)
    slopes = (g - mean) @ y / squares
    best = (slopes**2 * squares).argmax(axis=0)  # explains the most
    return y.mean(axis=0) + (g_at - mean)[best].T * slopes[best, np.arange(y.shape[1])]


def _power(x: np.ndarray, y: np.ndarray, at: np.ndarray) -> np.ndarray:
    c = -EXPONENTS[:, None]
    return _best_line(x**c, y, at**c)


def _exponential(x: np.ndarray, y: np.ndarray, at: np.ndarray) -> np.ndarray:
    c = -RATES[:, None]
    return _best_line(np.exp(c * x), y, np.exp(c * at))


def _log(x: np.ndarray, y: np.ndarray, at: np.ndarray) -> np.ndarray:
    return _best_line(np.log(x)[None], y, np.log(at)[None])


def _log_log(x: np.ndarray, y: np.ndarray, at: np.ndarray) -> np.ndarray:
    return np.exp(_log(x, np.log(y), at))


FITS = (_power, _log, _exponential, _log_log)  # in the order of FAMILIES
