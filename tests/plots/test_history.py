import json
import math
import re
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from dinov2_custom.cli import history_parser
from dinov2_custom.errors import ConfigError, DataError
from dinov2_custom.plan.prices import Price
from dinov2_custom.plots.history import COLOURS, PANELS, bill, draw_history, forecast_runs, main, read_runs
from dinov2_custom.plots.metrics_file import Run, find_runs, read_run
from dinov2_custom.plots.page import config_differences
from dinov2_custom.train.gpus import describe_device
from tests.browser import count_pixels, needs_browser

CONFIG = {"dino": {"head_n_prototypes": 256}, "crops": {"local_crops_number": 8}, "optim": {"base_lr": 0.004}}
UPSTREAM = [
    "iteration", "iter_time", "data_time", "lr", "wd", "mom", "last_layer_lr", "current_batch_size", "total_loss",
    "dino_local_crops_loss", "dino_global_crops_loss", "koleo_loss", "ibot_loss",
]  # fmt: skip
OURS = [
    "grad_norm_backbone", "grad_norm_dino_head", "teacher_entropy", "prototype_entropy", "images_per_s", "data_wait",
    "memory_mib", "skipped_steps", "rankme", "eval_knn", "eval_rankme", "eval_cosine_to_start", "eval_uniformity",
]  # fmt: skip


def rows(keys, count=5, step=10):
    return [{"iteration": step * i} | {key: 1.0 + i / 10 for key in keys[1:]} for i in range(count)]


def titles(figure):
    return [axis.get_title(loc="left") for axis in figure.axes if axis.axison]


def panel(figure, title):
    return next(axis for axis in figure.axes if axis.get_title(loc="left") == title)


def write(folder, keys=(*UPSTREAM, *OURS), config=CONFIG, count=5):
    folder.mkdir()
    lines = [json.dumps(row) for row in rows(keys, count)]
    (folder / "training_metrics.json").write_text("\n".join([*lines, '{"iteration": 50, "total']))
    (folder / "config.yaml").write_text(json.dumps(config))
    return folder


def draw(*arguments) -> int:
    return main(history_parser().parse_args([str(a) for a in arguments]))


def test_everything_a_run_reports_has_a_panel_with_a_unit():
    figure = draw_history([Run("r", rows([*UPSTREAM, *OURS]), CONFIG)])
    assert titles(figure) == [p.title for p in PANELS if not p.title.endswith("of a decoder")]
    shown = [axis for axis in figure.axes if axis.axison]
    assert all(axis.get_xlabel() == "iteration" and axis.get_ylabel() for axis in shown)


def test_upstreams_rows_have_no_panels_of_ours():
    figure = draw_history([Run("r", rows(UPSTREAM), {})])
    gone = {"Teacher's assignments", "Gradient norm before clipping", "Throughput", "Peak memory of rank 0"}
    gone |= {"Steps skipped as not finite", "RankMe of a training batch", "kNN accuracy", "RankMe of the evaluation"}
    gone |= {"Similarity to the start", "Uniformity and alignment"}
    gone |= {"Validation of a decoder", "Validation loss of a decoder"}
    assert set(titles(figure)) == {p.title for p in PANELS} - gone
    wait = panel(figure, "Time spent waiting for data").lines[0]
    np.testing.assert_allclose(wait.get_ydata(), 100.0)  # both times are equal in these rows


def test_a_run_without_skipped_steps_has_no_panel_of_them():
    healthy = [row | {"skipped_steps": 0} for row in rows([*UPSTREAM, *OURS])]
    assert "Steps skipped as not finite" not in titles(draw_history([Run("r", healthy, CONFIG)]))


def test_numbers_and_the_level_of_collapse():
    figure = draw_history([Run("r", rows([*UPSTREAM, *OURS]), CONFIG)])
    curves = panel(figure, "DINO loss").lines
    np.testing.assert_array_equal(curves[0].get_xdata(), [0, 10, 20, 30, 40])
    np.testing.assert_allclose(curves[0].get_ydata(), [2.0, 2.2, 2.4, 2.6, 2.8])  # local + global
    np.testing.assert_allclose(curves[1].get_ydata(), [1.0, 1.1, 1.2, 1.3, 1.4])
    assert curves[-1].get_ydata()[0] == pytest.approx(math.log(256))
    assert [text.get_text() for text in panel(figure, "DINO loss").texts] == ["ln(prototypes) = 5.55"]
    assert panel(figure, "Peak memory of rank 0").lines[0].get_ydata()[0] == pytest.approx(1 / 1024)


def test_the_level_of_the_start_is_that_of_the_latest_evaluation():
    earlier, training = {"iteration": 0, "eval_rankme": 7.7, "start_rankme": 6.5}, {"iteration": 30, "total_loss": 1.0}
    for start, expected in (({"start_rankme": 3.0}, [3.0]), ({}, [])):
        latest = {"iteration": 20, "eval_rankme": 4.2} | start
        axis = panel(draw_history([Run("r", [earlier, latest, training], CONFIG)]), "RankMe of the evaluation")
        assert [line.get_ydata()[0] for line in axis.lines if len(set(line.get_ydata())) == 1] == expected


def test_nan_and_missing_numbers_are_gaps():
    some = rows(["iteration", "total_loss"])
    some[1]["total_loss"], some[2]["total_loss"] = math.nan, None
    line = panel(draw_history([Run("r", some, {})]), "Total loss").lines[0]
    np.testing.assert_array_equal(line.get_xdata(), [0, 30, 40])


def test_long_noisy_curves_are_smoothed_schedules_are_not():
    figure = draw_history([Run("r", rows(["iteration", "total_loss", "lr"], count=1000), {})])
    raw, smooth = panel(figure, "Total loss").lines
    assert len(raw.get_xdata()) == 1000 and len(smooth.get_xdata()) < 1000
    np.testing.assert_allclose(smooth.get_ydata(), 1 + smooth.get_xdata() / 100)  # of a straight line: on the line
    assert [len(line.get_xdata()) for line in panel(figure, "Learning rate").lines] == [1000]


def test_runs_are_distinguished_by_colour():
    runs = [Run(name, rows(UPSTREAM), CONFIG) for name in ("a", "b")]
    figure = draw_history(runs)
    first, second = panel(figure, "Total loss").lines
    assert first.get_color() != second.get_color()
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["a", "b"]
    assert len({line.get_linestyle() for line in panel(figure, "DINO loss").lines[:3]}) == 3


def test_files_of_one_run(tmp_path, capsys):
    out = write(tmp_path / "<run>&co")
    assert draw(out) == 0
    assert capsys.readouterr().out.split("\n")[:2] == [str(out / "history.png"), str(out / "history.html")]
    with Image.open(out / "history.png") as image:
        assert min(image.size) > 1000 and len(image.convert("RGB").getcolors(1 << 24)) > 20
    page = (out / "history.html").read_text()
    assert "<svg" in page and "&lt;run&gt;&amp;co" in page and "<run>" not in page
    assert not re.search(r"<script|<link|<img|src=|@import|url\((?!#)", page)
    assert set(re.findall(r'(?:href)="([^#"][^"]*)"', page)) == set()
    assert sorted(p.name for p in out.iterdir()) == [
        "config.yaml", "history.html", "history.png", "training_metrics.json",
    ]  # fmt: skip


def test_means_over_each_pass_are_written_for_a_run_with_epochs(tmp_path):
    out = write(tmp_path / "run")
    losses, epochs = [4.0, 2.0, math.nan, 3.0, 1.0], [0.5, 1.0, 1.25, 2.0, 2.5]
    numbers = [{"iteration": 10 * i, "total_loss": losses[i], "epoch": epochs[i]} for i in range(5)]
    (out / "training_metrics.json").write_text("".join(json.dumps(row) + "\n" for row in numbers))
    assert draw(out) == 0
    assert (out / "epochs.csv").read_text().split() == [
        "pass,rows,iteration,total_loss,epoch", "1,2,10,3.0,1.0", "2,2,30,3.0,2.0", "3,1,40,1.0,2.5",
    ]  # fmt: skip


def test_comparison_shows_the_settings_that_differ(tmp_path):
    other = {**CONFIG, "optim": {"base_lr": 0.001}, "train": {"output_dir": "x"}}
    folders = [write(tmp_path / "a"), write(tmp_path / "b", config=other)]
    assert draw(*folders, "--output-dir", tmp_path / "new" / "place") == 0
    page = (tmp_path / "new" / "place" / "history.html").read_text()
    assert "<td>optim.base_lr</td><td>0.004</td><td>0.001</td>" in page
    assert config_differences([Run("a", [], CONFIG), Run("b", [], other)]) == [["optim.base_lr", "0.004", "0.001"]]


def test_no_run_is_one_sentence(tmp_path):
    with pytest.raises(DataError, match=r"got none at .*nothing"):
        draw(tmp_path / "nothing")


def test_a_file_in_the_way_is_one_sentence(tmp_path):
    run = write(tmp_path / "run")
    with pytest.raises(ConfigError, match="which is a file -> choose another with --output-dir$"):
        draw(run, "--output-dir", run / "training_metrics.json")


def test_drawing_does_not_load_torch():
    code = "import sys, dinov2_custom.plots.history, dinov2_custom.plots.page; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_a_flat_entropy_is_flat_from_zero_and_epochs_are_above():
    flat = [{"iteration": 10 * i, "teacher_entropy": 5.54 - i * 1e-6, "epoch": i + 0.1} for i in range(5)]
    axis = panel(draw_history([Run("r", flat, CONFIG)]), "Teacher's assignments")
    assert axis.get_ylim()[0] == 0 and axis.get_ylim()[1] > math.log(256)
    assert not axis.yaxis.get_offset_text().get_text()
    assert axis.child_axes[0].get_xlabel() == "passes over the data"


def test_a_forecast_is_drawn_and_priced(tmp_path, capsys):
    config = {"train": {"OFFICIAL_EPOCH_LENGTH": 100}, "optim": {"epochs": 3, "warmup_epochs": 0}}
    out = write(tmp_path / "run", config=config)
    lines = [
        {
            "iteration": 10 * i,
            "eval_knn": 0.5 - 0.4 / (10 * i + 1) ** 0.5,
            "iter_time": 36.0,
            "current_batch_size": 8.0,
            "images_per_s": 8 / 36,
            "epoch": (10 * i + 1) / 100,
        }
        for i in range(30)
    ]
    (out / "training_metrics.json").write_text("\n".join(map(json.dumps, lines)))
    assert draw(out, "--forecast", 3, "--gpu", "h100", "--price", "h100=2") == 0
    assert "3 more epochs (300 iterations, 3 passes over the data), 3 h, $6: eval_knn +0.0" in capsys.readouterr().out
    assert "3 h, $6: eval_knn +0.0" in (out / "history.html").read_text()
    (out / "logs").mkdir()
    for name, gpu, words in (
        ("NVIDIA H100 80GB HBM3", "", "$6: "),
        ("NVIDIA L4", "", "no price of L4 (--price L4=DOLLARS): "),
        ("AMD EPYC", "", "no price of AMD EPYC: "),
        ("AMD EPYC", "H100", "no price for H100: the hours are those of AMD EPYC: "),
    ):
        (out / "logs" / "log.txt").write_text(f"I] {describe_device('cuda', name, 8, 1)}\n")
        run = read_run(out, "run")
        assert f"3 h, {words}" in bill(run, forecast_runs([run], None, 3), 0, 3, gpu, {"H100": Price(2, 2)})
    with pytest.raises(ConfigError, match="--metric nothing"):
        draw(out, "--forecast", 3, "--metric", "nothing")


@pytest.mark.parametrize(("end", "last_evaluation"), [(2990, 2799), (3990, 2399)])
def test_the_change_starts_at_the_end_of_the_run_not_at_the_last_evaluation(end, last_evaluation):
    lines = [{"iteration": i, "total_loss": 1.0, "epoch": (i + 1) / 100} for i in range(9, end, 10)]
    for row in lines[19:]:
        if row["iteration"] <= last_evaluation and (row["iteration"] + 1) % 200 == 0:
            row["eval_knn"] = 0.3 + 0.05 * math.log(row["iteration"])
    run = Run("r", lines, {})
    forecasts = forecast_runs([run], None, 1)
    made, truth = forecasts.found[0], 0.05 * math.log((end + 99) / (end - 1))
    assert made.change_low <= truth <= made.change_high and made.change == pytest.approx(truth, rel=0.05)
    assert made.x[0] == last_evaluation and made.x[-1] == end + 99
    assert f"eval_knn +{truth:.2g}" in bill(run, forecasts, 0, 1, "", {})


def test_a_price_needs_the_number_of_gpus_and_their_name():
    lines = [{"iteration": 10 * i, "eval_knn": 0.5 - 0.4 / (i + 1), "iter_time": 36.0} for i in range(30)]
    lines = [row | {"epoch": (row["iteration"] + 1) / 100, "current_batch_size": 8.0} for row in lines]

    def words(rows, gpu, device=""):
        run = Run("r", rows, {}, device)
        return bill(run, forecast_runs([run], None, 1), 0, 1, gpu, {"H100": Price(2, 2)})

    assert "1 h, no price, the rows do not show the number of GPUs: " in words(lines, "H100")
    assert "1 h, no price, the rows do not show the number of GPUs: " in words(lines, "", "NVIDIA H100 80GB HBM3")
    lines[20] = lines[20] | {"images_per_s": 4 * 8 / 36}  # as written by 4 GPUs; the rows after it are without
    assert "1 h, $8: " in words(lines, "H100")
    assert "1 h, no price, its log does not name the GPU (--gpu GPU): " in words(lines, "")


def learning(key):
    """Return rows whose ``key`` rises steadily, with 100 iterations a pass."""
    return [{"iteration": i, "epoch": (i + 1) / 100, key: 0.5 - 0.4 / (i + 1) ** 0.5} for i in range(0, 300, 10)]


@pytest.mark.parametrize(
    "config",
    [
        "train:\n  OFFICIAL_EPOCH_LENGTH: 100\noptim:\n",
        "train:\n  OFFICIAL_EPOCH_LENGTH: 100\noptim:\n  epochs: abc\n",
        "train:\n  OFFICIAL_EPOCH_LENGTH: 100\noptim:\n  warmup_epochs: abc\n",
        "train:\n  OFFICIAL_EPOCH_LENGTH: 100\noptim:\n  epochs: .inf\n",
        "train:\n  OFFICIAL_EPOCH_LENGTH: 100\n  max_hours: abc\n",
        "train:\n  OFFICIAL_EPOCH_LENGTH: 100\n  batch_size_per_gpu: ${nothing}\n",
        "train:\n  OFFICIAL_EPOCH_LENGTH: auto\n  batch_size_per_gpu: 0\n",
        "train:\n  OFFICIAL_EPOCH_LENGTH: abc\n",
        "dino:\n  head_n_prototypes: 256\n",
        "train: [\n",
        "",
    ],
)
def test_a_config_that_cannot_be_used_refuses_the_forecast_of_its_run_only(config, tmp_path):
    good = {"train": {"OFFICIAL_EPOCH_LENGTH": 100}, "optim": {"warmup_epochs": 0}}
    for name, text in (("bad", config), ("good", json.dumps(good))):
        write(tmp_path / name)
        (tmp_path / name / "config.yaml").write_text(text)
        rows = "\n".join(map(json.dumps, learning("eval_knn")))
        (tmp_path / name / "training_metrics.json").write_text(rows)
    forecasts = forecast_runs(read_runs(find_runs([tmp_path])), None, 1)
    assert re.fullmatch(r"config.yaml of that run cannot be read \(.+\)", forecasts.refused[0])
    assert list(forecasts.refused) == [0] and list(forecasts.found) == [1]


def test_each_run_has_the_forecast_of_its_own_metric():
    nan = [row | {"eval_knn": math.nan} for row in learning("eval_rankme")]
    runs = [Run(name, rows, {}) for name, rows in (("a", learning("eval_knn")), ("b", nan), ("c", learning("lr")))]
    forecasts = forecast_runs(runs, None, 1)
    assert forecasts.metrics[0] == "eval_knn" and forecasts.metrics[1] == "eval_rankme"
    assert "eval_rankme +" in bill(runs[1], forecasts, 1, 1, "", {})
    assert list(forecasts.refused) == [2] and forecasts.refused[2].startswith("this run has no eval_knn or ")
    figure = draw_history(runs, forecasts=forecasts)
    for title, number in (("kNN accuracy", 0), ("RankMe of the evaluation", 1)):
        assert [line.get_color() for line in panel(figure, title).lines if line.get_linestyle() == "--"] == [
            COLOURS[number]
        ]
    assert forecast_runs(runs, "eval_knn", 1).refused == {
        1: "this run has no eval_knn", 2: "this run has no eval_knn"
    }  # fmt: skip


def test_flags_without_effect_are_refused(tmp_path):
    out = write(tmp_path / "run")
    for flags in (["--gpu", "H100"], ["--price", "T4=1"], ["--metric", "lr"]):
        with pytest.raises(ConfigError, match=f"{flags[0]}: no effect without --forecast"):
            draw(out, *flags)
    with pytest.raises(ConfigError, match="--gpu FOO: expected one of"):
        draw(out, "--forecast", 1, "--gpu", "FOO")


@pytest.mark.parametrize("text", ["0", "-5", "nan", "inf", "1e300", "x"])
def test_a_forecast_is_of_a_number_of_epochs_above_0(text, capsys):
    with pytest.raises(SystemExit):
        history_parser().parse_args(["run", f"--forecast={text}"])
    assert "expected a number above 0" in capsys.readouterr().err


def test_a_run_without_rows_is_left_out_with_a_warning(tmp_path, capsys):
    write(tmp_path / "all") and write(tmp_path / "all" / "a") and write(tmp_path / "all" / "b")
    (tmp_path / "all" / "training_metrics.json").unlink()
    (tmp_path / "all" / "b" / "training_metrics.json").write_text("")
    assert [run.folder.name for run in read_runs(find_runs([tmp_path / "all"]))] == ["a"]
    assert "left out" in (said := capsys.readouterr().err) and str(tmp_path / "all" / "b") in said
    with pytest.raises(DataError, match="expected rows of metrics, got none in"):
        read_runs([tmp_path / "all" / "b"])


def test_the_label_of_a_level_is_not_on_the_curve():
    def labels(end):
        figure = draw_history([Run("r", [{"iteration": i, "eval_knn": end, "start_knn": 0.5} for i in range(3)], {})])
        return [text.get_va() for text in panel(figure, "kNN accuracy").texts]

    assert labels(0.52) == ["top"] and labels(0.48) == ["baseline"]


@pytest.mark.parametrize(("key", "label"), [("val_ap", "AP"), ("val_miou", "mIoU")])
def test_a_decoder_has_panels_and_a_forecast_of_its_score(key, label, tmp_path, capsys):
    lines = []
    for epoch in range(1, 15):
        row = {"iteration": 10 * epoch - 1, "epoch": float(epoch), "total_loss": 5 + 9 / epoch, "iter_time": 3.6}
        lines.append(row | {key: 0.5 - 0.4 / epoch, "val_loss": 6 + 5 / epoch})
    (tmp_path / "training_metrics.json").write_text("\n".join(map(json.dumps, lines)))
    assert draw(tmp_path, "--forecast", 10) == 0
    time = "10 more epochs (100 iterations, 10 passes over the data), 0.1 h, "
    assert f"{time}no price, the rows do not show the number of GPUs: {key} +0.0" in capsys.readouterr().out
    shown = draw_history([Run("r", lines, {})])
    assert {"Validation of a decoder", "Validation loss of a decoder", "Total loss"} <= set(titles(shown))
    assert "AP or IoU" == panel(shown, "Validation of a decoder").get_ylabel()


@needs_browser
def test_a_browser_shows_the_figures(tmp_path):
    draw(write(tmp_path / "run"))
    assert min(count_pixels(tmp_path / "run" / "history.html", COLOURS[:3], tmp_path)) > 50
