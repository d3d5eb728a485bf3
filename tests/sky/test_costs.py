"""The estimate: the training's own count of operations, hours and dollars as computed by hand."""

import re
import runpy

import pytest
import yaml

from dinov2_custom.configs.load import load_run_config
from dinov2_custom.train.flops import flops_per_image, peak_flops
from tests.sky.conftest import REPOSITORY
from tests.sky.rules import candidates

SCRIPT = str(REPOSITORY / "sky" / "costs.py")
VITL = ["--config-file", str(REPOSITORY / "configs" / "vitl.yaml")]


@pytest.fixture
def report(monkeypatch, capsys):
    """Return a function that runs the script with arguments: (exit code, what it printed, its errors)."""

    def run(*arguments: str):
        monkeypatch.setattr("sys.argv", [SCRIPT, *arguments])
        code = runpy.run_path(SCRIPT)["main"]()
        return code, *capsys.readouterr()

    return run


def test_hours_and_dollars_by_hand(report):
    options = ["optim.global_batch=1024", "optim.epochs=10", "train.batch_size_per_gpu=64"]
    code, out, error = report(*VITL, "--images", "1024000", "--gpus", "16", "--price", "H100=2", *options)
    assert code == 0, error
    assert "10 epochs = 10,000 steps x 1,024 images = 10.24 million images" in out and "ESTIMATES" in out
    cfg = load_run_config(VITL[1], options, require_dataset=False, world_size=16)
    gflop = flops_per_image(cfg, 1024, 24) / 1e9
    assert f" {gflop:,.0f} GFLOP" in out
    row = next(line for line in out.splitlines() if line.startswith("| 16 x H100 |"))
    rates, hours, spot, on_demand = (
        [float(value.replace(",", "")) for value in cell.split(" - ")] for cell in row.strip("| ").split(" | ")[1:]
    )
    assert rates == pytest.approx([16 * 989e3 * share / gflop for share in (0.2, 0.4)], rel=0.01)
    assert hours == pytest.approx([10_240_000 / rate / 3600 for rate in rates[::-1]], rel=0.1)
    assert spot == on_demand == pytest.approx([16 * 2 * value for value in hours], rel=0.1)


def test_it_is_the_number_of_the_recipes_header(report):
    (header,) = re.findall(r"Estimated: (\d+) GFLOP per image", (REPOSITORY / "configs" / "vitl.yaml").read_text())
    _, out, _ = report(*VITL, "--images", "1000000")
    assert f"x 512 images = 100.04 million images, {int(header):,} GFLOP per image" in out


def test_an_epoch_of_a_fixed_length_needs_no_number_of_images(report):
    _, out, _ = report(*VITL, "train.OFFICIAL_EPOCH_LENGTH=1250", "optim.global_batch=1024")
    assert "100 epochs = 125,000 steps x 1,024 images = 128.00 million images" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "got none; add --images N"),
        (["no.such=1", "--images", "5"], "no.such"),
        (["--images", "-4", "--gpus", "0"], "expected --gpus and --images above 0, got 0 and -4"),
        (["--images", "5", "--price", "H10=2"], "--price: expected some of H100, "),
        (["--images", "5", "--gpus", "3", "optim.global_batch=8"], "start 2 or 4 processes"),
        (["train.max_hours=5"], "got train.max_hours=5: that is it"),
    ],
)
def test_mistakes_are_one_line(report, arguments, message):
    code, _, error = report(*VITL, *arguments)
    assert code == 1 and error.startswith("error: ") and message in error and "Traceback" not in error


def test_a_forks_configuration_can_be_estimated(report, tmp_path):
    (tmp_path / "fork.yaml").write_text("student: {arch: vit_small}\nfork: {key: 1}\n")
    code, _, error = report("--config-file", str(tmp_path / "fork.yaml"))
    assert code == 1 and "--allow-unknown-keys" in error
    code, out, _ = report("--config-file", str(tmp_path / "fork.yaml"), "--allow-unknown-keys")
    assert code == 0 and "| 8 x H100 |" in out


def test_every_gpu_of_the_task_has_a_price_and_the_order_follows_from_the_prices():
    prices = runpy.run_path(SCRIPT)["PRICES"]
    task = yaml.safe_load((REPOSITORY / "sky" / "train.yaml").read_text())
    per_image = {True: [], False: []}
    for choice in candidates(task):
        name = choice["accelerators"].split(":")[0]
        spot, on_demand = prices[name]
        if choice["accelerators"].endswith(":8"):
            per_image[choice["use_spot"]].append((spot if choice["use_spot"] else on_demand) / peak_flops(name))
    assert per_image == {kind: sorted(values) for kind, values in per_image.items()}


def test_a_wrong_flag_is_answered_in_two_lines(report, capsys):
    with pytest.raises(SystemExit, match="2"):
        report("--no-such-flag")
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("error: ") and lines[-1] == "help: python sky/costs.py --help" and len(lines) <= 3
