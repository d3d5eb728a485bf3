import numpy as np
import pytest

from dinov2_custom.plots.forecast import MIN_POINTS, Forecast, make_forecast

X = np.arange(10.0, 610.0, 10.0)
RNG = np.random.default_rng(0)


@pytest.mark.parametrize("shape", [lambda x: 2 + 3 * x**-0.5, lambda x: 0.1 + 0.05 * np.log(x)], ids=["power", "log"])
def test_a_curve_without_noise_is_continued(shape):
    made = make_forecast(X, shape(X + 1), 4 * X[-1])
    assert made.x[-1] == 4 * X[-1] and np.all(made.low <= made.high)
    assert made.y[-1] == pytest.approx(shape(4 * X[-1] + 1), rel=0.01)


@pytest.mark.parametrize(
    ("x", "y", "reason"),
    [
        (X[: MIN_POINTS - 1], X[: MIN_POINTS - 1], "11 points"),
        (X, np.full(X.size, 3.0), "equal"),
        (X, RNG.normal(size=X.size), "steadily"),
        (X, (X - X.mean()) ** 2, "steadily"),
    ],
    ids=["few", "constant", "noise", "turning"],
)
def test_what_cannot_be_forecast_is_a_reason(x, y, reason):
    made = make_forecast(x, y, 4 * X[-1])
    assert not isinstance(made, Forecast) and reason in made


def correlated(r: float, seed: int) -> np.ndarray:
    """Return noise of variance 1 whose neighbours have correlation ``r``: AR(1)."""
    draws = np.random.default_rng(seed).normal(size=X.size)
    for i in range(1, X.size):
        draws[i] = r * draws[i - 1] + np.sqrt(1 - r**2) * draws[i]
    return draws


@pytest.mark.parametrize(("noise", "r"), [(0.02, 0.0), (0.05, 0.8)])
@pytest.mark.parametrize(
    "shape",
    [lambda x: 2 + 3 * x**-0.3, lambda x: 6 + 40 / x, lambda x: 0.6 - 0.3 * np.exp(-x / 200)],
    ids=["slow", "fast", "levelling"],
)
def test_the_band_contains_the_truth_at_four_times_the_length(shape, noise, r):
    truth, inside, refused = shape(X + 1), 0, 0
    for seed in range(20):
        made = make_forecast(X, truth + noise * np.ptp(truth) * correlated(r, seed), 4 * X[-1], seed)
        refused += isinstance(made, str)
        inside += isinstance(made, Forecast) and made.low[-1] <= shape(4 * X[-1] + 1) <= made.high[-1]
    assert inside >= 16 and refused <= (2 if r else 0)


# python run/quickstart.py --seeds 0 train.max_steps=400: its rows after the warm-up, of iterations 50, 60 .. 390, 399
QUICKSTART_LOSS = [
    6.625, 6.503, 6.416, 6.381, 6.358, 6.342, 6.336, 6.334, 6.334, 6.333, 6.316, 6.307, 6.298, 6.261, 6.255,
    6.236, 6.217, 6.185, 6.185, 6.162, 6.14, 6.14, 6.136, 6.129, 6.116, 6.085, 6.054, 6.074, 6.08, 6.079, 6.067,
    6.054, 6.037, 6.013, 6.036, 6.045,
]  # fmt: skip
QUICKSTART_RANKME = [
    10.0, 10.7, 11.6, 12.6, 14.2, 16.7, 16.7, 17.5, 18.6, 19.4, 19.8, 20.0, 20.5, 20.9, 21.1, 21.9, 22.3, 22.0,
    22.0, 22.0, 22.8, 22.7, 22.7, 23.1, 23.1, 23.2, 23.1, 23.1, 23.2, 22.8, 24.0, 23.8, 23.4, 23.3, 23.3, 23.2,
]  # fmt: skip


@pytest.mark.parametrize("values", [QUICKSTART_LOSS, QUICKSTART_RANKME], ids=["loss", "rankme"])
@pytest.mark.parametrize("part", [1 / 2, 2 / 3])
def test_the_band_contains_the_end_of_the_quickstarts_curve(values, part):
    x, y = np.array([*range(50, 400, 10), 399.0]), np.array(values)
    known = x <= part * x[-1]
    made = make_forecast(x[known], y[known], x[-1])
    assert made.low[-1] <= y[-5:].mean() <= made.high[-1]
    assert np.sign(made.change) == np.sign(y[-1] - y[0])
