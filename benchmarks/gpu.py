"""Measure time and memory of the step on a CUDA GPU against upstream with xformers. **We had no GPU to run it yet.**

``python -m benchmarks.gpu --output gpu.md``: images/s, peak memory and MFU of ViT-L, S and B, one engine at a time on
one card, within eight minutes; ours also with its data loader, and how long an evaluation during a run takes beyond its
forward passes. The page is rewritten after each row, and an engine that fails gets a row with the error. Needs CUDA;
``pip install xformers scikit-image scikit-learn`` first. To try it without a GPU:
``python -m tests.cuda_host.run -m benchmarks.gpu --small`` (kNN fails there, as nothing is computed).
"""

from __future__ import annotations

import argparse
import gc
import importlib
import importlib.metadata
import os
import statistics
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import distributed
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.machine import describe, table
from benchmarks.memory import step_operations
from benchmarks.photographs import encoded
from benchmarks.step import COMMON, Step, batch_for, our_step, steps_of
from dinov2_custom.configs.load import load_run_config
from dinov2_custom.data.loaders import make_train_loader
from dinov2_custom.data.samples import unpack
from dinov2_custom.eval.utils import ModelWithNormalize
from dinov2_custom.train.flops import peak_flops
from dinov2_custom.train.online import KNN_BATCH, OnlineEvaluation
from dinov2_custom.train.ssl_meta_arch import SSLMetaArch
from tests.oracle import OracleTrainer, ensure_oracle, load_oracle
from tests.oracle import trainer as oracle_trainer

MODELS = {"vit_large": (64, 128), "vit_small": (64, 128), "vit_base": (64, 128)}  # most important first
OPTIONS = f"{COMMON} train.activation_checkpointing=none"  # `auto` measures the step first, for up to 20 s
COMPILED = "train.compile=on"
BF16 = [
    f"compute_precision.{model}.{part}.mixed_precision.{kind}=bf16"
    for model in ("student", "teacher")
    for part in ("backbone", "dino_head", "ibot_head")
    for kind in ("param_dtype", "reduce_dtype")
]
FILES = 400  # photographs of 500 x 375 that the loader reads
WARM_UP, BLOCKS = 3, 3
HEADER = ["model", "batch", "engine", "images/s", "peak GB", "reserved GB", "MFU", "host ms a step", "attention"]
EVALUATION = ["model", "batch", "evaluation", "ms", "its forward passes, ms", "more, ms"]
PAUSE_S = 3.0  # before an evaluation; in a run, processes have more time to read labelled images ahead
NOTES = """
2 x 224 + 8 x 98 px, patch 14, 65,536 prototypes, bf16. The batch lies in pinned memory and each step moves it, or, with
the loader, is made from {files} JPEG files of 500 x 375 in this machine's page cache by {workers} processes. images/s:
the median of {blocks} blocks of {steps} steps, waiting for the GPU at the end of a block alone. peak: allocated, and
reserved by torch's allocator. host ms: until a step is submitted; near the step's time, the GPU waits for Python.
attention: the operators that a step called for it.

* xformers: {xformers}.
* "upstream, autocast" is its unmodified step under bf16 autocast, TF32 allowed as it does: the stream between its
  blocks is float32, as ours is not. "upstream, FSDP" is what it ships, 16-bit parameters under FSDP, here of one NCCL
  process, which shards nothing. Both read each loss on the host in every step, as its training loop does.
* Ours is the step of the training loop, with the check that every number is finite and the update that depends on it.
* The weights are random, and no checkpoints of activations are made.
"""
EVALUATION_NOTES = """
An evaluation during a run (`evaluation.online`) of up to 256 of the photographs, without kNN and with kNN on all
{files}, and its forward passes alone, on batches that are on the GPU already: medians of {blocks}. "more": by how much
the evaluation delays the next step beyond them.
"""


class Measured(NamedTuple):
    """Median seconds of a step, median seconds in which the host launches it, peak bytes allocated and reserved, and
    the attention operators."""

    seconds: float
    host: float
    allocated: int
    reserved: int
    attention: str


def xformers_state() -> tuple[bool, str]:
    """Return whether xformers computes attention here, and its version or the reason why not.

    xformers reports why its library did not load; it then silently uses torch's attention.
    """
    try:
        state = importlib.import_module("xformers._cpp_lib")._cpp_library_load_exception
        ops = importlib.import_module("xformers.ops")
        if state is not None:
            return False, f"its library did not load: {state}".replace("\n", " ")
        q = torch.zeros(1, 8, 2, 64, device="cuda", dtype=torch.bfloat16)
        ops.memory_efficient_attention(q, q, q)
    except (ImportError, NotImplementedError) as e:
        return False, f"does not run here: {type(e).__name__}: {e}".replace("\n", " ")
    return True, importlib.metadata.version("xformers")


def upstream_step(oracle, overrides: list[str], batch: dict, *, autocast: bool = True) -> Step:
    """Return upstream's whole step with the real xformers in place of the tests' stand-in."""
    ops, fmha = importlib.import_module("xformers.ops"), importlib.import_module("xformers.ops.fmha")
    attention = oracle.vits.MemEffAttention.forward.__globals__
    attention.update(memory_efficient_attention=ops.memory_efficient_attention, unbind=ops.unbind)
    block = oracle.vits.Block.forward.__globals__
    block.update(fmha=fmha, index_select_cat=ops.index_select_cat, scaled_index_add=ops.scaled_index_add)
    oracle_trainer._Stays = lambda tensor: tensor  # here ``cuda()`` does move
    with torch.device("cuda"):
        trainer = OracleTrainer(oracle, overrides)
    return reading(steps_of(trainer, oracle, batch, "cuda", autocast))


def measure_upstream_fsdp(overrides: list[str], batch: dict, repetitions: int) -> Measured:
    """Time upstream's whole step as shipped: 16-bit parameters under FSDP, in a group of one NCCL process."""
    oracle = load_oracle.__wrapped__(ensure_oracle())  # a copy that the other engines do not use
    for name in ("get_fsdp_wrapper", "get_fsdp_modules", "reshard_fsdp_model"):
        setattr(oracle.arch, name, getattr(oracle.fsdp, name))
    oracle.distributed._LOCAL_RANK, oracle.distributed._LOCAL_WORLD_SIZE = 0, 1
    distributed.init_process_group("nccl", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        return measure(upstream_step(oracle, [*overrides, *BF16], batch, autocast=False), repetitions)
    finally:
        distributed.destroy_process_group()


def reading(step: Step) -> Step:
    """Return ``step``, extended to read every loss on the host."""

    def read(index: int) -> dict[str, torch.Tensor]:
        losses = step(index)
        for loss in losses.values():
            loss.item()
        return losses

    return read


class AttentionNames(TorchDispatchMode):
    """Collect the attention operators of the step."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().removeprefix("aten::_").removeprefix("scaled_dot_product_")
        if any(word in name for word in ("attention", "flash", "fmha", "efficient")) and "backward" not in name:
            self.found.add(name.partition(".")[0])
        return func(*args, **(kwargs or {}))


def measure(step: Step, repetitions: int, name_attention: bool = True) -> Measured:
    """Time blocks of ``repetitions`` steps; for compiled steps, attention operators cannot be identified."""
    attention = AttentionNames()
    if name_attention:
        with attention:
            step(0)
    for index in range(WARM_UP):
        step(index)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    seconds, host = [], []
    for _ in range(BLOCKS):
        start = time.perf_counter()
        for index in range(repetitions):
            submitted = time.perf_counter()
            step(index)
            host.append(time.perf_counter() - submitted)
        torch.cuda.synchronize()
        seconds.append((time.perf_counter() - start) / repetitions)
    peaks = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
    return Measured(statistics.median(seconds), statistics.median(host), *peaks, ", ".join(sorted(attention.found)))


def measure_with_loader(overrides: list[str], images: Path, workers: int, repetitions: int) -> Measured:
    """Time our steps on batches of the training loader."""
    options = [*overrides, f"train.dataset_path=ImageFolder:root={images}", f"train.num_workers={workers}"]
    cfg = load_run_config("", options, "unused", warn=lambda note: None)
    loader = make_train_loader(cfg, rank=0, world_size=1)
    with closing(loader.batches(device="cuda")) as batches:
        return measure(our_step(options, batches, device="cuda", made_on="cuda"), repetitions)


def measure_evaluation(
    overrides: list[str], images: Path, workers: int, knn: bool, device: str = "cuda", pause_s: float = PAUSE_S
) -> tuple[float, float]:
    """Return median seconds of an evaluation during a run, and of its forward passes alone."""
    options = [*overrides, f"train.dataset_path=ImageFolder:root={images}", f"train.num_workers={workers}"]
    labelled = [f"evaluation.online.{part}=LabelledFolder:root={images}" for part in ("knn_train", "knn_val")]
    options += ["evaluation.online.every=1", *(labelled if knn else [])]
    with tempfile.TemporaryDirectory() as out:
        cfg = load_run_config("", options, out, warn=lambda note: None)
        with torch.device(device):
            model = SSLMetaArch(cfg)
        model = model.to(device).train()
        model.prepare_for_distributed_training()
        with closing(OnlineEvaluation(cfg, make_train_loader(cfg, rank=0, world_size=1))) as online:
            online.evaluate_start(model, cfg.teacher.teacher_temp)
            temperature, finish = cfg.teacher.teacher_temp, online.loader.finish
            whole = _seconds(lambda: online.evaluate(model, 0, temperature, lambda: 0.0), device, pause_s)
            batches = [unpack(*packed, finish, torch.device(device)) for packed in online._batches]
            network = ModelWithNormalize(model.teacher["backbone"], model.precision("teacher", "backbone"))
            side, count = cfg.crops.global_crops_size, len(online.knn.dataset) if knn else 0
            crops = torch.zeros(count, 3, side, side, device=device)

            @torch.no_grad()
            def forward_passes() -> None:
                for batch in batches:
                    model.evaluate(batch, temperature)
                for part in crops.split(KNN_BATCH) if knn else ():
                    network(part)

            return whole, _seconds(forward_passes, device)


def _seconds(run: Callable[[], object], device: str, pause_s: float = 0.0) -> float:
    """Return the median seconds of ``run``, after one that is not counted, until the device is done."""
    seconds = []
    for _ in range(1 + BLOCKS):
        time.sleep(pause_s)
        start = time.perf_counter()
        run()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:])


def evaluation_rows(arch: str, batch_size: int, args, images: Path) -> Iterator[list[object]]:
    """Measure an evaluation of one model without and with kNN."""
    overrides = [*OPTIONS.split(), *args.override, f"student.arch={arch}", f"train.batch_size_per_gpu={batch_size}"]
    for knn in (False, True):
        run = partial(measure_evaluation, overrides, images, args.workers, knn)
        yield [arch, batch_size, "with kNN" if knn else "without kNN", *_evaluation_cells(run)]
        gc.collect()
        torch.cuda.empty_cache()


def _evaluation_cells(run: Callable[[], tuple[float, float]]) -> list[str]:
    def cells() -> list[str]:
        whole, passes = run()
        return [f"{1e3 * seconds:.0f}" for seconds in (whole, passes, whole - passes)]

    return _tried(cells, len(EVALUATION) - 3)


def rows(arch: str, batch_size: int, args, images: Path) -> Iterator[list[object]]:
    """Measure all engines on one model and batch, in turn."""
    overrides = [*OPTIONS.split(), *args.override, f"student.arch={arch}", f"train.batch_size_per_gpu={batch_size}"]
    cfg = load_run_config("", overrides, "unused", require_dataset=False, warn=lambda note: None)
    operations = step_operations(cfg)
    batch = {k: v.pin_memory() if torch.is_tensor(v) else v for k, v in batch_for(overrides, batch_size).items()}
    engines: dict[str, Callable[[], Measured]] = {}
    if not args.ours:
        upstream = partial(upstream_step, load_oracle(ensure_oracle()), overrides, batch)
        engines["upstream, autocast"] = lambda: measure(upstream(), args.repetitions)
        engines["upstream, FSDP"] = partial(measure_upstream_fsdp, overrides, batch, args.repetitions)
    for variant in ["", COMPILED, *args.variant]:
        ours = partial(our_step, [*overrides, *variant.split()], batch, device="cuda")
        named = COMPILED not in variant
        engines[f"ours {variant}".strip()] = lambda ours=ours, named=named: measure(ours(), args.repetitions, named)
    engines["ours, loader included"] = partial(measure_with_loader, overrides, images, args.workers, args.repetitions)
    for name, run in engines.items():
        if name.startswith("upstream") and not args.xformers:
            cells = ["no xformers here", *["-"] * (len(HEADER) - 4)]
        else:
            cells = _cells(run, batch_size, operations)
        yield [arch, batch_size, name, *cells]
        gc.collect()
        torch.cuda.empty_cache()


def _cells(run: Callable[[], Measured], batch_size: int, operations: float) -> list[str]:
    def cells() -> list[str]:
        seconds, host, allocated, reserved, attention = run()
        peak = peak_flops(torch.cuda.get_device_name())
        mfu = f"{operations / seconds / peak:.0%}" if peak else "unknown GPU"
        memory = f"{allocated / 1e9:.1f}", f"{reserved / 1e9:.1f}"
        return [f"{batch_size / seconds:.0f}", *memory, mfu, f"{host * 1e3:.0f}", attention]

    return _tried(cells, len(HEADER) - 3)


def _tried(cells: Callable[[], list[str]], width: int) -> list[str]:
    """Return ``cells()``, or the error in the first of ``width`` cells, since the other rows are still wanted."""
    try:
        return cells()
    except torch.cuda.OutOfMemoryError:
        return ["out of memory", *["-"] * (width - 1)]
    except Exception as e:
        traceback.print_exc()
        return [f"failed: {type(e).__name__}", *["-"] * (width - 1)]


def write_photographs(folder: Path, count: int) -> None:
    """Write ``count`` JPEG files in four folders, which are the classes of kNN."""
    for index, data in enumerate(encoded(500, 375, "JPEG", count)):
        path = folder / str(index % 4) / f"{index:04}.jpg"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(data)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="only architectures whose name contains this")
    parser.add_argument("--repetitions", type=int, default=8, help="steps a block")
    parser.add_argument("--minutes", type=float, default=6.0, help="begin no further row after this")
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 2) - 1), help="of the loader")
    parser.add_argument("--ours", action="store_true", help="without upstream")
    parser.add_argument("--output", type=Path, metavar="FILE", help="where the page goes too")
    parser.add_argument("--small", action="store_true", help="one small batch, to see that all of it runs")
    parser.add_argument(
        "--variant", action="append", default=[], help="overrides for a further row of ours; may be repeated"
    )
    args = parser.parse_args()
    start = time.monotonic()
    if not torch.cuda.is_available():
        parser.error("expected a CUDA GPU, got none; benchmarks.step is for CPUs")
    warnings.simplefilter("ignore")  # upstream's
    torch.backends.cuda.matmul.allow_tf32 = True  # as upstream does; our float32 products are negligible
    args.xformers, state = xformers_state()
    print(f"xformers: {state}", flush=True)
    # the CUDA stand-in computes nothing, so that no number is finite
    args.override = ["train.max_nonfinite_steps=1000"] if args.small else []
    models, args.files = ({"vit_small": (4,)}, 8) if args.small else (MODELS, FILES)
    lines: list[list[object]] = []
    evaluations: list[list[object]] = []
    with tempfile.TemporaryDirectory() as folder:
        write_photographs(Path(folder), args.files)
        measured: list[tuple[list[list[object]], Iterator[list[object]]]] = []
        for arch, sizes in models.items():
            if args.only in arch:
                measured += [(lines, rows(arch, size, args, Path(folder))) for size in sizes]
                measured.append((evaluations, evaluation_rows(arch, sizes[0], args, Path(folder))))
        for table_rows, row in ((one, row) for one, found in measured for row in found):
            table_rows.append(row)
            print(" | ".join(map(str, row)), f"| after {time.monotonic() - start:.0f} s", flush=True)
            if args.output:  # after each row, so that an interrupted run keeps its results
                args.output.write_text(_page(args, lines, state, evaluations))
            if time.monotonic() - start > args.minutes * 60:
                break
    print(_page(args, lines, state, evaluations))


def _page(args, lines: list[list[object]], xformers: str, evaluations: Sequence[list[object]] = ()) -> str:
    counts = {"files": args.files, "workers": args.workers, "blocks": BLOCKS, "steps": args.repetitions}
    about = describe("benchmarks.gpu", f"cuda={torch.version.cuda}")
    notes = NOTES.format(xformers=xformers, **counts)
    page = f"# The step on {torch.cuda.get_device_name()}\n\n{about}{notes}\n{table(HEADER, lines)}"
    if evaluations:
        page += f"{EVALUATION_NOTES.format(**counts)}\n{table(EVALUATION, evaluations)}"
    return page


if __name__ == "__main__":
    main()
