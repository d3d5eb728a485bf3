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


@pytest.mark.parametrize("noise", [0.01, 0.05])
@pytest.mark.parametrize("shape", [lambda x: 2 + 3 * x**-0.3, lambda x: 6 + 40 / x], ids=["slow", "fast"])
def test_the_band_contains_the_truth_at_four_times_the_length(shape, noise):
    truth, inside = shape(X + 1), 0
    for seed in range(20):
        scatter = np.random.default_rng(seed).normal(size=X.size)
        made = make_forecast(X, truth + noise * np.ptp(truth) * scatter, 4 * X[-1], seed)
        inside += isinstance(made, Forecast) and made.low[-1] <= shape(4 * X[-1] + 1) <= made.high[-1]
    assert inside >= 16
