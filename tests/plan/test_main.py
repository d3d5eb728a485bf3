"""The table, the ablation and the schedules, on tiny models."""

import pytest
import torch

from dinov2_custom.cli import plan_parser
from dinov2_custom.errors import ConfigError
from dinov2_custom.plan import main as plan_main
from dinov2_custom.plan.main import Counts, choose, find_by_user_name, length_of, main
from dinov2_custom.plan.timing import Timing, random_batch, time_apart, time_steps
from dinov2_custom.train.checkpoint import Checkpointer
from dinov2_custom.train.gpus import GPU, GPUS
from dinov2_custom.train.memory import SHARE_OF_TENSORS, least_checkpointing, measure_step
from dinov2_custom.train.optimization import build_optimizer, build_schedulers
from dinov2_custom.train.ssl_meta_arch import SSLMetaArch
from tests.train.batches import TINY, tiny_config

LENGTH = ("train.OFFICIAL_EPOCH_LENGTH=auto", "optim.epochs=10", "optim.warmup_epochs=1")


@pytest.fixture
def plan(capsys):
    """Return a function that runs the command: its lines, and its rows as dicts."""

    def run(*arguments):
        assert main(plan_parser().parse_args([*arguments, *TINY, *LENGTH])) == 0
        lines = capsys.readouterr().out.splitlines()
        cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| ")]
        return lines, [dict(zip(cells[0], row, strict=True)) for row in cells[1:]]

    return run


def test_hours_and_dollars_by_hand(plan):
    lines, rows = plan(
        "--images", "1024000", "--batch", "4,8", "--gpus", "1,16", "--gpu", "H100,a100-40gb", "--price", "H100=2"
    )
    assert len(rows) == 8 and len({(row["batch"], row["GPUs"], row["GPU"]) for row in rows}) == 8
    assert any("predicted, not measured" in line for line in lines)
    assert "10 epochs = 80,000 steps x 128 images = 10.24 million images" in lines
    row = next(row for row in rows if (row["batch"], row["GPUs"], row["GPU"]) == ("8", "16", "H100"))
    hours = 80_000 * float(row["s/iteration"]) / 3600
    assert float(row["hours"]) == pytest.approx(hours, rel=0.02)
    assert float(row["GPU-hours"]) == pytest.approx(16 * hours, rel=0.02)
    assert row["spot, $"] == row["on-demand, $"] and float(row["spot, $"]) == pytest.approx(32 * hours, rel=0.02)
    assert float(row["images/s"].replace(",", "")) == pytest.approx(128 / float(row["s/iteration"]), rel=0.02)


def test_without_the_number_of_images_there_are_no_hours(plan):
    lines, ((row),) = plan("--gpu", "T4")
    assert row["hours"] == row["spot, $"] == "-" and float(row["s/iteration"]) > 0
    assert any("--images" in line for line in lines)
    with pytest.raises(ConfigError, match="--images"):
        plan("--schedule")


def test_a_run_by_the_clock_takes_its_hours(plan):
    _, ((row),) = plan("--gpu", "H100", "--images", "1000", "train.max_hours=5")
    assert row["hours"] == "5"


def test_what_does_not_fit_has_no_time_and_no_price(plan, monkeypatch):
    monkeypatch.setitem(GPUS, "T4", GPU(1e6, 1e12, 1e11))
    _, ((row),) = plan("--gpu", "T4", "--images", "1000")
    assert (row["fits"], row["s/iteration"], row["hours"], row["largest batch"]) == ("no", "-", "-", "0")


def test_what_is_recomputed_is_what_training_would():
    cfg = tiny_config("student.arch=vit_micro", "train.batch_size_per_gpu=64", "train.activation_checkpointing=auto")
    none, selective = measure_step(SSLMetaArch, cfg).peak, measure_step(SSLMetaArch, cfg, "selective").peak
    for room in (2 * none, (none + selective) / 2):
        gpu = GPU(room / SHARE_OF_TENSORS, 1e14, 1e12)
        choice = choose(cfg, gpu, 1, Counts())
        assert choice.mode == least_checkpointing(SSLMetaArch, cfg, gpu.memory) and choice.fits
        assert choice.needed == choice.peak == measure_step(SSLMetaArch, cfg, choice.mode).peak


def test_sharded_weights_take_less_of_each_gpu():
    sharded = [
        f"compute_precision.{model}.{part}.sharding_strategy=FULL_SHARD"
        for model in ("student", "teacher")
        for part in ("backbone", "dino_head")
    ]
    counts, h100 = Counts(), GPUS["H100"]
    whole = choose(tiny_config(), h100, 1, counts).needed
    assert (
        choose(tiny_config(*sharded), h100, 8, counts).needed - 1e9
        < whole
        < choose(tiny_config(), h100, 8, counts).needed - 1e9
    )


def test_a_global_batch_is_divided_as_training_does(plan):
    _, ((row),) = plan("--gpu", "H100", "--gpus", "2", "--images", "960", "optim.global_batch=96", "--batch", "12")
    assert (row["batch"], row["accumulated"]) == ("12", "4")


def test_the_largest_batch_is_the_same_for_the_same_memory():
    cfg, counts = tiny_config(), Counts()
    counts.step(cfg, "none")
    limit = 3 * measure_step(SSLMetaArch, cfg).peak
    found = counts.largest(cfg, "none", limit)
    assert found == counts.largest(cfg, "none", limit)
    assert measure_step(SSLMetaArch, tiny_config(f"train.batch_size_per_gpu={found}")).peak <= limit
    larger = tiny_config(f"train.batch_size_per_gpu={found + found // 8 + 1}")
    assert measure_step(SSLMetaArch, larger).peak > limit


def test_names_of_gpus():
    assert [find_by_user_name(text) for text in ("a100-80gb", "RTX4090", "RTX A5000", "h100-pcie")] == [
        "A100-80GB", "4090", "A5000", "H100-PCIe",
    ]  # fmt: skip
    with pytest.raises(ConfigError, match="--gpu A1000: expected one of .*A100-40GB"):
        find_by_user_name("A1000")


def test_the_checkpoint_has_the_size_that_the_table_says(tmp_path):
    cfg = tiny_config("student.arch=vit_micro", "dino.head_n_prototypes=8192")
    model = SSLMetaArch(cfg)
    optimizer = build_optimizer(cfg, model.get_params_groups())
    for parameter in model.student.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    Checkpointer(tmp_path, model, optimizer).save(0, wait=True)
    size = sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file())
    assert plan_main.checkpoint_bytes(Counts().step(cfg, "none")) == pytest.approx(size, rel=0.05)


def test_a_few_real_steps_are_timed():
    cfg = tiny_config("optim.accumulation_steps=2", "ibot.mask_sample_probability=0.5")
    timing = time_steps(cfg, num_steps=1)
    assert timing.seconds > 0 and timing.peak > measure_step(SSLMetaArch, cfg).peak
    batch = random_batch(cfg, torch.Generator().manual_seed(0))
    assert batch["collated_masks"].sum() == batch["n_masked_patches"] == len(batch["mask_indices_list"])
    assert batch["masks_weight"].sum() == pytest.approx(batch["collated_masks"].any(1).sum())


def test_the_time_measured_in_a_process_of_its_own_is_a_row(plan, monkeypatch):
    asked = []
    monkeypatch.setattr(plan_main, "time_apart", lambda cfg: asked.append(cfg) or Timing(0.5, 3 * 10**9))
    lines, rows = plan("--time", "--gpu", "H100", "--images", "7200", "optim.accumulation_steps=2")
    predicted, measured = rows
    assert measured["GPU"].endswith("measured") and asked[0].optim.accumulation_steps == 1
    assert measured["recomputed"] == "none"
    assert (measured["s/iteration"], measured["GB"], measured["hours"]) == ("1", "3.00", "2.5")
    assert predicted["GPU"] == "H100"


def test_an_ablation_measures_each_combination(plan, monkeypatch):
    asked = []

    def measured(cfg):
        dtype = cfg.compute_precision.student.backbone.mixed_precision.param_dtype
        asked.append((dtype, cfg.train.batch_size_per_gpu, cfg.student.arch))
        return Timing(0.5, 2**30) if cfg.train.batch_size_per_gpu < 4 else None

    monkeypatch.setattr(plan_main, "time_apart", measured)
    axes = ("precision=fp32,bf16", "batch=2,4", "arch=vit_nano,vit_micro")
    _, rows = plan("--ablate", *axes, "--time")
    assert asked == [(p, b, a) for p in ("fp32", "bf16") for b in (2, 4) for a in ("vit_nano", "vit_micro")]
    assert [row["MiB"] for row in rows] == ["1,024", "1,024", "-", "-"] * 2
    assert rows[0] | {"s/iteration": "0.5", "images/s": "4.0", "arch": "vit_nano"} == rows[0]


def test_an_ablation_without_time_is_predicted(plan):
    lines, rows = plan("--gpu", "H100", "--ablate", "precision=fp32,bf16", "train.lean=true")
    assert len(rows) == 2 and float(rows[0]["s/iteration"]) > 0 and "predicted, not measured" in lines[-1]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--memory", "--gpu", "L4", "--images", "3"], "--gpu, --images: no effect with --memory"),
        (["--fits", "24", "--time"], "--time: no effect with --fits"),
        (["--schedule", "--ablate", "batch=2"], "--ablate: no effect with --schedule"),
        (["--ablate", "batch=2", "--gpus", "2"], "--gpus: no effect with --ablate"),
        (["--output-dir", "x"], "--output-dir: no effect on the table"),
        (["--ablate", "batch=2", "batch=4"], "each key once"),
        (["--ablate", "batch=2", "--gpu", "L4,T4"], "one --gpu, got L4,T4"),
        (["--schedule", "--gpus", "1,2"], "one number of --gpus"),
        (["--time", "--gpus", "2"], "one device; expected 1 among --gpus"),
        (["--ablate", "precision=fp64"], "--ablate precision=fp64: expected auto .* fp32 .*, got 'fp64'$"),
        (["--ablate", "batch=x"], "--ablate batch=x: expected a whole number of at least 1, got 'x'$"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_would_be_ignored_is_refused(plan, arguments, words):
    with pytest.raises(ConfigError, match=words):
        plan(*arguments)


@pytest.mark.parametrize("arguments", [["--fits", "0"], ["--fits=-3"], ["--fits", "nan"], ["--price", "T4=inf"]])
def test_numbers_are_above_0(arguments, capsys):
    with pytest.raises(SystemExit):
        plan_parser().parse_args(arguments)
    assert "expected a number above 0" in capsys.readouterr().err


def test_an_axis_is_split_outside_of_brackets():
    axes = ["crops.global_crops_scale=[0.3,1.0],[0.5,1.0]", "train.compile=on,off", "x=[[1, 2],3],4"]
    found = plan_parser().parse_args(["--ablate", *axes]).ablate
    assert [values for _, values in found] == [["[0.3,1.0]", "[0.5,1.0]"], ["on", "off"], ["[[1, 2],3]", "4"]]


def test_a_process_of_its_own_measures_its_own_memory():
    timing = time_apart(tiny_config())
    assert timing.seconds > 0 and timing.peak > 50e6


def test_the_schedules_are_those_of_training(plan, tmp_path):
    pytest.importorskip("matplotlib")
    folder = tmp_path / "new" / "folder"
    lines, rows = plan("--schedule", "--images", "400", "--output-dir", str(folder))
    cfg = tiny_config(*LENGTH)
    schedules = build_schedulers(cfg, length_of(cfg, 400, 1))
    assert [int(float(row["iteration"])) for row in rows][::10] == [0, 999]
    for row in rows:
        i = int(float(row.pop("iteration")))
        assert [float(cell) for cell in row.values()] == pytest.approx([float(s[i]) for s in schedules], rel=1e-3)
    assert (folder / "schedule.png").read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_the_schedules_are_a_table(plan, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    lines, rows = plan("--schedule", "--images", "400", "--output-dir", str(tmp_path))
    assert len(rows) == 11 and not list(tmp_path.iterdir()) and "dinov2_custom[plots]" in lines[-1]
