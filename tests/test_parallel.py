"""Two real processes (gloo): reduced gradients, and a run whose result does not depend on the number of processes."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from dinov2_custom import parallel
from dinov2_custom.configs.load import load_run_config
from dinov2_custom.parallel import GradientReducer, _grouped
from dinov2_custom.sharding import reduce_dtype
from dinov2_custom.train import train as train_module
from dinov2_custom.train.optimization import accumulate_gradients
from dinov2_custom.train.ssl_meta_arch import SSLMetaArch
from tests.processes import launch, launch_source
from tests.train.batches import TINY, random_batch, tiny_config
from tests.train.test_train import weights, write_images


def test_buckets_hold_every_parameter_once_in_order():
    parameters = [nn.Parameter(torch.zeros(n)) for n in (10, 300, 5, 5, 5)]
    parameters.append(nn.Parameter(torch.zeros(3, dtype=torch.bfloat16)))
    runs = list(_grouped(parameters, max_bytes=64))
    assert [[p.numel() for p in run] for run in runs] == [[10], [300], [5, 5, 5], [3]]


def test_one_process_needs_nothing():
    p = nn.Parameter(torch.ones(2))
    reducer = GradientReducer([("p", p)])
    reducer.arm()
    (p.sum() * 3).backward()
    reducer.finish()
    assert torch.equal(p.grad, torch.full((2,), 3.0))


def facts_of_two(folder: Path, source: str) -> list[dict]:
    """Run ``source`` in two processes, each of which writes a JSON file into ``folder``; return these by rank."""
    launch_source(folder, source, str(folder))
    files = sorted(folder.glob("*.json"))
    assert len(files) == 2
    return [json.loads(file.read_text()) for file in files]


def test_two_processes_average_and_must_have_the_same_gradients(tmp_path):
    """A parameter without a gradient in one process is named one step later; an unused one has no gradient."""
    source = """
import json, sys, torch
from torch import nn
from dinov2_custom import distributed
from dinov2_custom.parallel import GradientReducer
distributed.enable()
rank = distributed.get_global_rank()
both, one, none = (nn.Parameter(torch.ones(3)) for _ in range(3))
named = {"both": both, "one": one, "none": none}
reducer = GradientReducer(named.items(), bucket_mib=1e-6)
(both.sum() * 10).backward()            # accumulated before, not reduced yet

def step(loss):
    reducer.arm()
    loss.backward()
    reducer.finish()

step(both.sum() * (rank + 1) + one.sum() * (4 - 4 * rank))
facts = [both.grad.tolist(), one.grad.tolist(), none.grad]
one.grad = None
step(both.sum() + one.sum() if rank else both.sum())
try:
    step(both.sum())
except RuntimeError as e:
    facts.append(str(e))
json.dump(facts, open(f"{sys.argv[1]}/{rank}.json", "w"))
distributed.disable()
"""
    launch_source(tmp_path, source, str(tmp_path))
    for rank in (0, 1):
        both, one, none, error = json.loads((tmp_path / f"{rank}.json").read_text())
        assert (both, one, none) == ([11.5] * 3, [2.0] * 3, None)
        assert error.endswith(" of one")


NO_MASK = """
import sys, torch
from dinov2_custom import distributed
from tests.test_parallel import gradients_of
distributed.enable()
rank = distributed.get_global_rank()
torch.save(gradients_of([rank]), f"{sys.argv[1]}/{rank}.pt")
distributed.disable()
"""


def gradients_of(ranks: list[int]) -> dict[str, torch.Tensor]:
    """Return the gradients of the joined batches of ``ranks``, the second of which has no masked patch."""
    results = {}
    for options in (("lean=true", "view_groups=4"), ("lean=false", "view_groups=1")):
        for centering in ("centering", "sinkhorn_knopp"):
            own = (f"train.{option}" for option in (*options, f"centering={centering}"))
            cfg = tiny_config("dino.koleo_loss_weight=0", "ibot.separate_head=true", *own)
            model = SSLMetaArch(cfg).train()
            reducer = parallel.parallelize(cfg, model)
            batch = joined([random_batch(cfg, seed=rank, masked=rank == 0) for rank in ranks])
            accumulate_gradients(cfg, model, reducer, batch, iter(()), 0.05, torch.Generator())
            reducer.check()
            named = model.student.named_parameters()
            results |= {f"{options} {centering} {name}": parameter.grad for name, parameter in named}
    return results


def joined(batches: list[dict]) -> dict:
    """Join collated batches: the images of both, first crops first."""
    whole = {"upperbound": sum(batch["upperbound"] for batch in batches)}
    for name, parts in {"collated_global_crops": 2, "collated_local_crops": 2, "collated_masks": 2}.items():
        views = zip(*(batch[name].chunk(parts) for batch in batches), strict=True)
        whole[name] = torch.cat([one for view in views for one in view])
    masks = whole["collated_masks"]
    whole["mask_indices_list"] = masks.flatten().nonzero().flatten()
    whole["masks_weight"] = (1 / masks.sum(dim=1).clamp_min(1)).unsqueeze(1).expand_as(masks)[masks]
    return whole | {"n_masked_patches": torch.full((1,), len(whole["masks_weight"]))}


def test_a_process_without_masked_patches_has_gradients_of_zero(tmp_path):
    launch_source(tmp_path, NO_MASK, str(tmp_path))
    expected = gradients_of([0, 1])
    for rank in (0, 1):
        for name, got in torch.load(tmp_path / f"{rank}.pt").items():
            torch.testing.assert_close(got, expected[name], rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
    assert all(value.abs().max() > 0 for name, value in expected.items() if "ibot_head" in name)


def tiny_run(images: Path, *options: str, strategy: str = "auto", dtype: str = "fp32") -> list[str]:
    """Return the command of a run whose result must not depend on how its batches are split."""
    parts = [
        f"compute_precision.{m}.{p}" for m in ("student", "teacher") for p in ("backbone", "dino_head", "ibot_head")
    ]
    precision = [f"{part}.mixed_precision.param_dtype={dtype}" for part in parts]
    sharding = [f"{part}.sharding_strategy={strategy}" for part in parts]
    return [
        "run/train/train.py", f"train.dataset_path={images}", *TINY, *precision, *sharding, "train.num_workers=0",
        "train.OFFICIAL_EPOCH_LENGTH=10", "optim.epochs=1", "optim.warmup_epochs=0.3", "train.log_every=1",
        "optim.freeze_last_layer_epochs=0", "dino.koleo_loss_weight=0", *options,
    ]  # fmt: skip


def compare(one: Path, other: Path) -> tuple[float, float]:
    """Return the largest difference of a weight, and of a loss relative to the loss."""
    first, second = weights(one), weights(other)
    apart = max(float((first[key] - second[key]).abs().max()) for key in first)
    return apart, max(relative for *_, relative in losses_apart(one, other))


def losses_apart(one: Path, other: Path) -> list[tuple[int, str, float]]:
    """Return (iteration, loss, relative difference) of all losses that two runs have logged."""
    rows, others = (
        [json.loads(line) for line in (out / "training_metrics.json").read_text().splitlines()] for out in (one, other)
    )
    assert [row["iteration"] for row in rows] == [row["iteration"] for row in others]
    names = [name for name in rows[0] if name.endswith("_loss")]
    pairs = zip(rows, others, strict=True)
    return [(a["iteration"], name, abs(b[name] / a[name] - 1)) for a, b in pairs for name in names if a[name]]


def assert_same(one: Path, other: Path) -> None:
    """Check that two runs differ by rounding only; else name the losses that differ."""
    apart, losses = compare(one, other)
    found = "\n".join(map(str, losses_apart(one, other)))
    bad = [out.name for out in (one, other) if (out / "bad_images.jsonl").exists()]
    assert apart < 1e-5 and losses < 1e-5, f"weights {apart}, losses {losses}, bad images in {bad}\n{found}"


CUTS = [  # processes, accumulated batches, strategy, centering, activation checkpointing, groups of views
    (2, 1, "NO_SHARD", "sinkhorn_knopp", "selective", 4),
    (2, 2, "SHARD_GRAD_OP", "centering", "full", 2),
    (2, 1, "FULL_SHARD", "centering", "full", 4),
    (4, 1, "FULL_SHARD", "centering", "selective", 1),
    (4, 1, "NO_SHARD", "sinkhorn_knopp", "none", 2),
]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Return a function that trains in one process with a batch of 8, once per set of options."""
    folder, done = tmp_path_factory.mktemp("alone"), {}
    images = write_images(folder / "images", 12)

    def train(*options: str) -> tuple[Path, Path]:
        if options not in done:
            done[options] = folder / str(len(done))
            command = tiny_run(images, *options, "train.batch_size_per_gpu=8")
            arguments = [*command[1:], "--output-dir", str(done[options])]
            assert train_module.main(train_module.get_args_parser().parse_args(arguments)) == 0
        return images, done[options]

    return train


@pytest.mark.parametrize(("processes", "accumulated", "strategy", "centering", "recompute", "groups"), CUTS)
def test_however_a_batch_is_cut_losses_and_weights_are_the_same(
    alone, tmp_path, processes, accumulated, strategy, centering, recompute, groups
):
    """Both sides use lean blocks; one uses sharding, groups of views and checkpointing."""
    options = [f"train.centering={centering}", "ibot.separate_head=true"]
    images, expected = alone(*options)
    cut = ["optim.global_batch=8", f"optim.accumulation_steps={accumulated}"]
    cut += [f"train.activation_checkpointing={recompute}", f"train.view_groups={groups}"]
    command = tiny_run(images, *options, *cut, strategy=strategy)
    done = launch(processes, *command, "--output-dir", str(tmp_path / "out"))
    assert f"{processes} processes, backbone={strategy} dino_head={strategy} ibot_head={strategy}" in done.stdout
    assert "Warning" not in done.stdout + done.stderr
    assert_same(expected, tmp_path / "out")
    start = SSLMetaArch(load_run_config(expected / "config.yaml", [], "unused", require_dataset=False)).state_dict()
    final = weights(expected)
    moved = max(float((final[name] - value).abs().max()) for name, value in start.items() if name.startswith("student"))
    assert moved > 1e-3


COMPILED = """
import functools, json, os, torch
from dinov2_custom import entry
from dinov2_custom.train import fast_paths, train
fast_paths.compile_step = functools.partial(fast_paths.compile_step, backend="aot_eager")
rank = os.environ["RANK"]
code = train.main(train.get_args_parser().parse_args())
counters = torch._dynamo.utils.counters
facts = [dict(counters["graph_break"]), counters["stats"]["unique_graphs"]]
json.dump(facts, open(f"{os.path.dirname(__file__)}/{rank}.json", "w"))
entry.leave(code)
"""


@pytest.mark.parametrize(
    ("strategy", "groups", "recompute"),
    [("NO_SHARD", 4, "selective"), ("FULL_SHARD", 1, "full")],
)
def test_compiled_in_two_processes_losses_and_weights_are_those_of_one(alone, tmp_path, strategy, groups, recompute):
    """This includes constant shapes. FSDP2's hooks lie outside the compiled branches, so there are no graph breaks."""
    options = ["train.centering=sinkhorn_knopp", "ibot.separate_head=true"]
    images, expected = alone(*options)
    cut = ["train.batch_size_per_gpu=4", "train.compile=on", f"train.view_groups={groups}"]
    cut += [f"train.activation_checkpointing={recompute}"]
    script = tmp_path / "compiled.py"
    script.write_text(COMPILED)
    command = tiny_run(images, *options, *cut, strategy=strategy)[1:]
    done = launch(2, str(script), *command, "--output-dir", str(tmp_path / "out"))
    assert f"2 processes, backbone={strategy} dino_head={strategy} ibot_head={strategy}" in done.stdout
    assert done.stdout.count("the first batch took") == 1  # the main process says so
    for rank in (0, 1):
        graph_breaks, graphs = json.loads((tmp_path / f"{rank}.json").read_text())
        assert not graph_breaks and graphs >= 4
    assert_same(expected, tmp_path / "out")


@pytest.mark.parametrize("dtype", ["bf16"])
def test_sharding_does_not_change_lower_precision(tmp_path, dtype):
    images = write_images(tmp_path / "images", 12)
    for strategy in ("NO_SHARD", "FULL_SHARD"):
        command = tiny_run(images, strategy=strategy, dtype=dtype)
        launch(2, *command, "--output-dir", str(tmp_path / strategy))
    assert_same(tmp_path / "NO_SHARD", tmp_path / "FULL_SHARD")


GATHERED = """
import sys, torch
from torch.utils._python_dispatch import TorchDispatchMode
from dinov2_custom import distributed, parallel
from dinov2_custom.train.optimization import accumulate_gradients
from dinov2_custom.train.ssl_meta_arch import SSLMetaArch
from tests.train.batches import random_batch, tiny_config
class Gathered(TorchDispatchMode):
    num_bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "allgather" in func.name():
            self.num_bytes += args[0].nbytes
        return func(*args, **kwargs or {})

distributed.enable()
rank, results = distributed.get_global_rank(), {}
for strategy in ("SHARD_GRAD_OP", "FULL_SHARD"):
    for gather in ("fp32", "param_dtype"):
        parts = [f"compute_precision.{m}.{p}" for m in ("student", "teacher") for p in ("backbone", "dino_head")]
        cfg = tiny_config(
            *(f"{part}.sharding_strategy={strategy}" for part in parts),
            *(f"{part}.mixed_precision.param_dtype=bf16" for part in parts),
            # of class tokens that are almost the same, as at the start, KoLeo sees the rounding alone
            f"compute_precision.gather_dtype={gather}", "train.view_groups=4", "dino.koleo_loss_weight=0",
        )
        model = SSLMetaArch(cfg).train()
        reducer = parallel.parallelize(cfg, model)
        with Gathered() as mode:
            batch = random_batch(cfg, rank)
            losses = accumulate_gradients(cfg, model, reducer, batch, iter(()), 0.05, torch.Generator())
        reducer.check()
        gradients = {name: p.grad.full_tensor() for name, p in model.student.named_parameters()}
        assert {g.dtype for g in gradients.values()} == {p.dtype for p in model.parameters()} == {torch.float32}
        key = f"{strategy} {gather}"
        results[key] = {"sent": mode.num_bytes, "losses": losses, "gradients": gradients}
torch.save(results, f"{sys.argv[1]}/{rank}.pt")
distributed.disable()
"""


def test_weights_gathered_in_16_bits_are_half_the_bytes_and_the_same_step_up_to_rounding(tmp_path):
    launch_source(tmp_path, GATHERED, str(tmp_path))
    results = torch.load(tmp_path / "0.pt")
    for strategy in ("SHARD_GRAD_OP", "FULL_SHARD"):
        whole, rounded = results[f"{strategy} fp32"], results[f"{strategy} param_dtype"]
        assert rounded["sent"] * 2 == whole["sent"] > 0
        for name, loss in whole["losses"].items():
            torch.testing.assert_close(rounded["losses"][name], loss, rtol=0.02, atol=0.02, msg=name)
        norms = {name: gradient.norm() for name, gradient in whole["gradients"].items()}
        apart = {name: (rounded["gradients"][name] - gradient).norm() for name, gradient in whole["gradients"].items()}
        assert max(apart.values()) < 0.05 * max(norms.values()), (strategy, norms, apart)


def test_a_loss_scale_where_one_part_is_sharded_and_another_is_whole(tmp_path):
    images = write_images(tmp_path / "images", 12)
    mixed = [f"compute_precision.{model}.backbone.sharding_strategy=FULL_SHARD" for model in ("student", "teacher")]
    for name, options in (("whole", []), ("mixed", mixed)):
        command = tiny_run(images, "train.max_steps=5", *options, strategy="NO_SHARD", dtype="fp16")
        done = launch(2, *command, "--output-dir", str(tmp_path / name))
    assert "backbone=FULL_SHARD dino_head=NO_SHARD" in done.stdout
    assert_same(tmp_path / "whole", tmp_path / "mixed")


def test_an_overflow_in_the_share_of_one_process_lowers_the_scale_of_all(tmp_path):
    source = """
import json, sys, torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from dinov2_custom import distributed
from dinov2_custom.parallel import own_share
from dinov2_custom.train.optimization import unscale
distributed.enable()
sharded, whole = fully_shard(nn.Linear(4, 4)), nn.Linear(4, 4)
parameters = [*sharded.parameters(), *whole.parameters()]
scaler = distributed.make_grad_scaler("cpu")
found = []
for overflows in (False, True):
    for p in parameters:
        p.grad = torch.full_like(p, 2.0 * scaler.scale(torch.ones(())).item())
    if overflows and distributed.get_global_rank() == 1:
        own_share(parameters[0].grad)[0, 0] = float("inf")
    unscale(scaler, torch.optim.SGD(parameters))
    found += [own_share(p.grad)[-1].flatten()[-1].item() for p in parameters]
    scaler.update()
found.append(scaler.get_scale())
open(f"{sys.argv[1]}/{distributed.get_global_rank()}.json", "w").write(json.dumps(found))
distributed.disable()
"""
    assert facts_of_two(tmp_path, source) == [[2.0] * 8 + [2.0**15]] * 2


def test_auto_shards_what_does_not_fit(monkeypatch):
    model = SSLMetaArch(tiny_config())
    needed = 20 * sum(p.numel() for p in model.student.parameters())
    monkeypatch.setattr(parallel.distributed, "get_global_size", lambda: 2)
    for room, expected in ((4.1 * needed, "NO_SHARD"), (3.9 * needed, "SHARD_GRAD_OP")):
        monkeypatch.setattr(parallel, "_device_bytes", lambda device, room=room: room)
        assert set(parallel.choose_strategies(model.cfg, model).values()) == {expected}
    monkeypatch.setattr(parallel.distributed, "get_global_size", lambda: 1)
    assert set(parallel.choose_strategies(model.cfg, model).values()) == {"NO_SHARD"}


def test_fp16_sums_need_the_loss_scaler():
    dtypes = [(name, param) for name in ("auto", "fp16", "bf16") for param in (torch.float16, torch.bfloat16)]
    found = [reduce_dtype(*pair) for pair in dtypes]
    assert found == [torch.float32, torch.float32, torch.float16, torch.float32, torch.bfloat16, torch.bfloat16]
