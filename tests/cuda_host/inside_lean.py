"""Launches, waits, pinned and copied bytes on the stand-in: the cost of the host side, and its leftovers.

Run by ``test_lean.py``. Kernels are not run, so values are meaningless.
"""

import itertools

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.step import COMMON, batch_for, our_step
from dinov2_custom.configs.load import load_run_config
from dinov2_custom.data import loaders
from dinov2_custom.data.loaders import Copier, make_train_loader
from dinov2_custom.data.pool import PinnedRing
from dinov2_custom.eval import knn
from dinov2_custom.eval.linear import LinearPostprocessor, eval_linear, setup_linear_classifiers
from dinov2_custom.eval.metrics import MetricType, build_metric
from dinov2_custom.eval.utils import (
    ModelWithIntermediateLayers,
    ModelWithNormalize,
    evaluate,
    extract_features_with_dataloader,
)
from dinov2_custom.models.vision_transformer import vit_small
from dinov2_custom.train import train as train_module
from dinov2_custom.train.checkpoint import Checkpointer
from dinov2_custom.train.memory import LiveBytes
from dinov2_custom.train.optimization import build_optimizer
from dinov2_custom.train.ssl_meta_arch import SSLMetaArch
from tests.cuda_host.compute import Computing
from tests.cuda_host.counts import counted, counts, sync_stacks, syncs
from tests.cuda_host.run import REPOSITORY
from tests.data.pictures import make_folder, train_config

CUDA = torch.device("cuda", 0)
CLASSES = 7


def model_of(*overrides):
    options = [*COMMON.split(), *overrides]
    cfg = load_run_config("", options, "unused", require_dataset=False, warn=lambda note: None)
    return cfg, SSLMetaArch(cfg).to(CUDA)


# batches on their way to the device


@pytest.fixture
def builder(tmp_path):
    make_folder(tmp_path / "images", [f"{i}.png" for i in range(20)])
    return make_train_loader(train_config(str(tmp_path / "images")), rank=0, world_size=1).builder


def test_slots_are_pinned_when_they_are_used(builder):
    ring = PinnedRing(builder, 1, 0, max_workers=16)
    with counted() as found:
        for _ in range(40):
            ring.release(ring.next_batch().slot)
    pinned = [torch.from_numpy(ring.slots.bytes_of(i)).is_pinned() for i in range(ring.slots.number)]
    ring.close()
    assert len(pinned) == 33 and 0 < sum(pinned) == found["cudaHostRegister"] <= 3


def test_the_first_launch_after_memory_that_cannot_be_pinned_works(builder, caplog):
    caplog.set_level("INFO", logger="dinov2")
    ring = PinnedRing(builder, 1, 0)
    runtime, places = torch.cuda.cudart(), [ring.slots.bytes_of(i) for i in range(ring.slots.number)]
    for place in places:  # to register it once more is an error of the runtime
        assert int(runtime.cudaHostRegister(place.ctypes.data, place.nbytes, 0)) == 0
    ring.release(ring.next_batch().slot)
    assert caplog.text.count("could not be pinned") == 1
    torch.ones(2, device=CUDA).add_(1)
    ring.next_batch()
    assert caplog.text.count("could not be pinned") == 1
    for place in places:
        runtime.cudaHostUnregister(place.ctypes.data)
    ring.close()


def test_memory_is_given_back_after_the_copies_from_it(builder, tmp_path, monkeypatch):
    loader = make_train_loader(train_config(str(tmp_path / "images"), num_workers=1), rank=0, world_size=1)
    copier, ready, close = Copier(CUDA), [], PinnedRing.close
    monkeypatch.setattr(loaders, "Copier", lambda device: copier)
    monkeypatch.setattr(PinnedRing, "close", lambda self: ready.append(copier.stream.query()) or close(self))
    batches = loader.batches(device=CUDA)
    next(batches)
    batches.close()
    assert ready == [True]


def test_the_host_sleeps_while_it_waits_for_an_event(builder, tmp_path, monkeypatch):
    """Without ``blocking`` CUDA polls, which keeps a core busy."""
    waited = []

    class Event(torch.cuda.Event):
        def __new__(cls, *args, blocking=False, **kwargs):
            made = super().__new__(cls, *args, blocking=blocking, **kwargs)
            made.is_blocking = blocking
            return made

        def synchronize(self):
            waited.append(self.is_blocking)
            super().synchronize()

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.chdir(REPOSITORY)
    options = ["--config-file", "configs/quickstart.yaml", "--output-dir", str(tmp_path / "run"), "train.max_steps=4"]
    options += [f"train.dataset_path=ImageFolder:root={tmp_path / 'images'}", "train.batch_size_per_gpu=4"]
    options += ["train.max_nonfinite_steps=99", "train.num_workers=1"]
    assert train_module.main(train_module.get_args_parser().parse_args(options)) == 0
    assert len(waited) >= 6 and all(waited)


# the step


@pytest.mark.parametrize(("arch", "most"), [("vit_small", 4), ("vit_large", 17)])
@pytest.mark.parametrize("skip", [False, True])
def test_the_teacher_moves_in_few_launches(arch, most, skip):
    _, model = model_of(f"student.arch={arch}")
    flag = torch.zeros((), device=CUDA) if skip else None
    with counted() as found:
        model.update_teacher(0.99, skip=flag)
    assert 0 < found["launches"] <= most and syncs(found) == 0


class Planned(TorchDispatchMode):
    """Record the shapes used with cuDNN's attention, each of which needs a plan."""

    def __init__(self):
        super().__init__()
        self.shapes = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "cudnn_attention" in func.name():
            self.shapes.add(tuple(tuple(one.shape) for one in args if isinstance(one, torch.Tensor)))
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("groups", [1, 2, 3, 4])
@pytest.mark.parametrize("recompute", ["none", "full"])
def test_no_step_asks_cudnn_for_another_shape_of_attention(groups, recompute):
    options = [*COMMON.split(), "student.arch=vit_tiny", "train.batch_size_per_gpu=8", "student.drop_path_rate=0.4"]
    options += [f"train.view_groups={groups}", f"train.activation_checkpointing={recompute}"]
    options += ["train.max_nonfinite_steps=1000000"]  # nothing is really computed
    batch = {name: v.pin_memory() if torch.is_tensor(v) else v for name, v in batch_for(options, 8).items()}
    step = our_step(options, batch, device="cuda")
    with Planned() as planned:
        step(0)
        first = set(planned.shapes)
        for number in range(1, 6):
            step(number)
    assert planned.shapes == first and len(first) <= 6


# evaluations


class Watched:
    """Batches in pinned memory; ``syncs``: number of host waits between consecutive batches."""

    def __init__(self, batches):
        self.batches, self.syncs = batches, []

    def __iter__(self):
        for batch in self.batches:
            before = syncs(counts())
            yield batch
            self.syncs.append(syncs(counts()) - before)


def images(number=4):
    pinned = [torch.rand(2, 3, 28, 28).pin_memory() for _ in range(number)]
    return [(batch, torch.tensor([0, 1]).pin_memory()) for batch in pinned]


@pytest.fixture
def linear():
    backbone = vit_small(patch_size=14, img_size=28).to(CUDA).eval()
    features = ModelWithIntermediateLayers(backbone, 4)
    rates = [10.0**-power for power in range(13)]
    classifiers, groups = setup_linear_classifiers(features(images(1)[0][0].to(CUDA)), (1, 4), rates, 2, CLASSES)
    assert len(classifiers) == 52
    return features, classifiers, groups


@pytest.mark.parametrize("kind", [MetricType.MEAN_ACCURACY, MetricType.IMAGENET_REAL_ACCURACY])
@pytest.mark.parametrize("mapping", [None, list(range(CLASSES))])
def test_scoring_classifiers_waits_for_no_batch(linear, kind, mapping):
    features, classifiers, _ = linear
    several = kind is MetricType.IMAGENET_REAL_ACCURACY
    loader = Watched([(batch, labels[:, None] if several else labels) for batch, labels in images()])
    named = classifiers.classifiers_dict.items()
    evaluate(
        features,
        loader,
        {name: LinearPostprocessor(classifier, mapping) for name, classifier in named},
        {name: build_metric(kind, num_classes=CLASSES) for name in classifiers.classifiers_dict},
        CUDA,
        lambda outputs, targets: outputs[0][1].float().sum(),
    )
    assert loader.syncs == [0] * 4


def test_training_classifiers_waits_for_no_batch(linear, tmp_path):
    features, classifiers, groups = linear
    optimizer = torch.optim.SGD(groups, momentum=0.9)
    loader = Watched(images(5))
    eval_linear(
        feature_model=features,
        linear_classifiers=classifiers,
        train_data_loader=loader,
        val_data_loader=images(1),
        metrics_file_path=tmp_path / "metrics.json",
        optimizer=optimizer,
        scheduler=torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 5),
        output_dir=tmp_path,
        max_iter=5,
        checkpoint_period=100,
        running_checkpoint_period=100,
        eval_period=0,
        metric_type=MetricType.MEAN_ACCURACY,
        training_num_classes=CLASSES,
    )
    assert loader.syncs[1:4] == [0] * 3  # the first has a line of the log, the last a checkpoint


@pytest.mark.parametrize("on_cpu", [False, True])
def test_extracting_features_waits_for_no_batch_but_the_one_before(on_cpu):
    model = ModelWithNormalize(vit_small(patch_size=14, img_size=28).to(CUDA).eval())
    places = torch.arange(8).pin_memory().split(2)
    loader = Watched([(batch, (place, labels)) for (batch, labels), place in zip(images(), places, strict=True)])
    with sync_stacks() as stacks, counted() as found:
        try:
            extract_features_with_dataloader(model, loader, 8, gather_on_cpu=on_cpu)
        except Exception as e:  # on the device, which images were seen takes kernels
            assert "expected the features of 8 images" in str(e) and not on_cpu
    if not on_cpu:
        assert loader.syncs == [0] * 4, stacks
    else:  # features, labels and indices of the batch before
        assert loader.syncs == [0, 3, 3, 3], stacks
        assert found["copy device to pageable"] == 0


def test_knn_waits_for_no_batch_and_does_not_copy_the_training_features(monkeypatch):
    monkeypatch.setattr(knn, "_QUERIES_A_STEP", 2)
    with Computing():
        train, queries = torch.rand(20_000, 64, device=CUDA), torch.rand(120, 64, device=CUDA)
        labels, wanted = (torch.arange(len(one), device=CUDA) % CLASSES for one in (train, queries))
        torch.cuda.reset_peak_memory_stats()
        before, waits = torch.cuda.memory_allocated(), []
        for number in (60, 120):
            with counted() as found:
                knn.eval_knn_features(train, labels, queries[:number], wanted[:number], nb_knn=[5])
            waits.append((syncs(found), found["copy pageable to device"]))
    assert torch.cuda.max_memory_allocated() - before < train.nbytes / 2
    assert waits[0] == waits[1], "none depends on the number of batches; torchmetrics has some at the start and the end"


# saves


class HostBytes(LiveBytes):
    """Count allocations in host memory only."""

    def _add_all(self, result):
        if isinstance(result, torch.Tensor) and result.device.type == "cpu":
            self.add(result)


def test_a_save_has_the_state_once_in_host_memory(tmp_path):
    cfg, model = model_of("student.arch=vit_tiny")
    optimizer = build_optimizer(cfg, model.get_params_groups())
    for parameter in model.student.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    saver = Checkpointer(tmp_path, model, optimizer)
    tensors = [*model.state_dict().values(), *itertools.chain(*(s.values() for s in optimizer.state.values()))]
    state = sum(t.nbytes for t in tensors)
    with HostBytes() as live:
        saver.save(0)
    assert 0 < sum(live.at_peak.values()) <= state + 2**20
    with HostBytes() as live:
        path = saver.save_teacher("training_0")
    teacher = torch.load(path, weights_only=True)["teacher"]  # read where they were written from: in host memory
    assert {tensor.device.type for tensor in teacher.values()} == {"cpu"}
    assert sum(live.at_peak.values()) <= sum(t.nbytes for t in teacher.values()) + 2**20 < state / 2
    saver.async_save = True
    with HostBytes() as live:
        saver.save(1)
        saver.wait()
    assert sum(live.at_peak.values()) >= state - 2**20


def test_what_this_file_relies_on():
    with counted() as found:
        float(torch.zeros((), device=CUDA))
    assert syncs(found) >= 1
