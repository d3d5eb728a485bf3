"""Prices: the package's, a file's, the command line's; the order of the SkyPilot task follows from them."""

import pytest
import yaml

from dinov2_custom.errors import ConfigError
from dinov2_custom.plan.prices import Price, load_prices
from dinov2_custom.train.gpus import GPUS
from tests.sky.conftest import REPOSITORY
from tests.sky.rules import candidates


def test_prices_of_the_package_are_of_known_gpus():
    assert set(load_prices()) < set(GPUS)
    assert all(0 < price.spot <= price.on_demand for price in load_prices().values())


def test_a_file_wins_over_the_package_and_the_command_line_over_both(tmp_path):
    (tmp_path / "p.yaml").write_text("A100-40GB: [0.5, 1]\n4090: 0.3\nH100: 9\n")
    prices = load_prices(str(tmp_path / "p.yaml"), [("H100", 2.1)])
    assert prices["A100-40GB"] == Price(0.5, 1) and prices["4090"] == Price(0.3, 0.3) and prices["H100"] == (2.1, 2.1)
    assert load_prices(given=[("rtx4090", 0.4)])["4090"] == (0.4, 0.4)  # names as --gpu accepts them
    assert prices["H200"] == load_prices()["H200"] and "T4" not in prices


def test_every_bad_price_is_named(tmp_path):
    (tmp_path / "p.yaml").write_text("H10: 1\nH200: [1]\nL4: cheap\nT4: true\nA10G: [false, 1]\nB200: [3, 2]\n")
    with pytest.raises(ConfigError) as error:
        load_prices(str(tmp_path / "p.yaml"), [("H100", -2.0)])
    bad = ("H10=1", "H200=[1]", "L4=cheap", "T4=True", "A10G=[False, 1]", "B200=[3, 2]", "--price: H100=-2.0")
    got = str(error.value).partition("; got ")[2]
    assert all(price in got for price in bad) and "SPOT at most ON DEMAND" in str(error.value)
    for text in ("- 1", "a: [", "a: b\n\n- c", "", None):
        path = tmp_path / "q.yaml"
        path.write_text(text) if text is not None else path.unlink()
        with pytest.raises(
            ConfigError, match=r"--prices .*q.yaml: expected a YAML file of lines such as H100: .*, got [^\n]+$"
        ):
            load_prices(str(path))


def test_every_gpu_of_the_task_has_a_price_and_the_order_follows_from_the_prices():
    prices = load_prices()
    task = yaml.safe_load((REPOSITORY / "sky" / "train.yaml").read_text())
    per_image = {True: [], False: []}
    for choice in candidates(task):
        name = choice["accelerators"].split(":")[0]
        if choice["accelerators"].endswith(":8"):
            price = prices[name].spot if choice["use_spot"] else prices[name].on_demand
            per_image[choice["use_spot"]].append(price / GPUS[name].flops)
    assert per_image == {kind: sorted(values) for kind, values in per_image.items()}
