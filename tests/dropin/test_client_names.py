"""Names and behaviour of upstream that published code uses, in addition to ``tests/contracts``."""

from __future__ import annotations

import argparse
import random
import subprocess
import sys

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image

from dinov2_custom import distributed
from dinov2_custom.compat.fsdp import FSDPCheckpointer
from dinov2_custom.data import DataAugmentationDINO, loaders
from dinov2_custom.data.augmentations import STEPS
from dinov2_custom.data.datasets import ExtendedVisionDataset, ImageDataset, ImageNet
from dinov2_custom.errors import DataError
from dinov2_custom.eval.metrics import MetricType, build_metric
from dinov2_custom.eval.setup import setup_and_build_model
from dinov2_custom.hub import backbones, classifiers
from dinov2_custom.hub import utils as hub_utils
from dinov2_custom.layers import Attention, MemEffAttention
from dinov2_custom.logging import remove_logging
from dinov2_custom.models import vision_transformer
from dinov2_custom.train.ssl_meta_arch import SSLMetaArch
from dinov2_custom.train.train import apply_optim_scheduler, build_optimizer, build_schedulers, do_test
from tests.eval.test_setup import make_run
from tests.oracle import OracleUnavailable, ensure_oracle, load_oracle
from tests.test_alias import site  # noqa: F401 - a fixture
from tests.test_parallel import facts_of_two
from tests.train.batches import random_batch, tiny_config


@pytest.fixture(scope="module")
def oracle_root():
    try:
        return ensure_oracle()
    except OracleUnavailable as e:
        pytest.skip(str(e))


# the augmentation


def augmentation(kind=DataAugmentationDINO, local_crops_number=2):
    return kind((0.32, 1.0), (0.05, 0.32), local_crops_number, global_crops_size=32, local_crops_size=16)


@pytest.fixture(scope="module")
def image():
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 60, 3), dtype=np.uint8))


def test_the_steps_one_by_one_give_the_crops_of_the_whole(image):
    augment = augmentation()
    for seed in range(20):
        whole, rng = augment(image, random.Random(seed)), random.Random(seed)
        cuts = [augment.geometric_augmentation_global] * 2 + [augment.geometric_augmentation_local] * 2
        colours = [augment.global_transfo1, augment.global_transfo2, augment.local_transfo, augment.local_transfo]
        crops = [change(cut(image, rng), rng) for cut, change in zip(cuts, colours, strict=True)]
        expected = [*whole["global_crops"], *whole["local_crops"]]
        assert all(torch.equal(crop, other) for crop, other in zip(crops, expected, strict=True))


def test_steps_are_called_as_upstreams(image):
    augment = augmentation()
    crop = augment.geometric_augmentation_local(image)
    assert (crop.size, crop.mode) == ((16, 16), "RGB") and augment.geometric_augmentation_global(image).size == (32, 32)
    for step in (augment.global_transfo1, augment.global_transfo2, augment.local_transfo, augment.normalize):
        assert step(crop).shape == (3, 16, 16) and step(crop).dtype == torch.float32
    white = augment.normalize(Image.new("RGB", (2, 2), (255, 255, 255)))[:, 0, 0]
    torch.testing.assert_close(white, torch.tensor([2.2489, 2.4286, 2.64]), atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", STEPS)
def test_a_replaced_step_takes_effect(name, image):
    """Replace it after ``super().__init__()``, as upstream requires; on an instance; and as a method."""

    def seen(*arguments):
        calls.append(arguments[-1].size)
        return arguments[-1] if name.startswith("geometric") else "changed"

    class Set(DataAugmentationDINO):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            setattr(self, name, seen)

    on_an_instance = augmentation()
    setattr(on_an_instance, name, seen)
    number = {"global_transfo1": 1, "global_transfo2": 1, "normalize": 4}.get(name, 2)
    method = augmentation(type("Method", (DataAugmentationDINO,), {name: seen}))
    for augment in (augmentation(Set), on_an_instance, method):
        calls = []
        crops = augment(image)
        assert len(calls) == number
        crops = [*crops["global_crops"], *crops["local_crops"]]
        if not name.startswith("geometric"):
            assert crops.count("changed") == number
        assert len(crops) == 4


# datasets


def test_parse_dataset_str():
    root = {"root": "/images"}
    assert loaders._parse_dataset_str("ImageNet:split=VAL:root=/images:extra=/extra") == (
        loaders.ImageNet,
        {**root, "extra": "/extra", "split": ImageNet.Split.VAL},
    )
    assert loaders._parse_dataset_str("ImageNet22k:root=/images:extra=/extra") == (
        loaders.ImageNet22k,
        {**root, "extra": "/extra"},
    )


def test_a_patched_parser_of_dataset_strings_takes_effect(monkeypatch):
    """Forks add their own datasets this way."""

    class Mine(ExtendedVisionDataset):
        def __init__(self, *, colour, **kwargs):
            super().__init__(**kwargs)
            self.colour = colour

    monkeypatch.setattr(loaders, "_parse_dataset_str", lambda text: (Mine, {"colour": text.partition("=")[2]}))
    dataset = loaders.make_dataset(dataset_str="Mine:colour=red", transform=str.lower)
    assert type(dataset) is Mine and dataset.colour == "red" and dataset.transform is str.lower


def test_an_image_that_cannot_be_read_is_a_runtime_error(tmp_path):
    (tmp_path / "a.png").write_bytes(b"not an image")
    Image.new("RGB", (8, 8)).save(tmp_path / "b.png")
    dataset = ImageDataset([str(tmp_path)])
    (tmp_path / "b.png").unlink()

    class Mine(ExtendedVisionDataset):
        def get_image_data(self, index):
            return (tmp_path / "no such file").read_bytes()

        def get_target(self, index):
            return 0

    for broken, index in ((dataset, 0), (dataset, 1), (Mine(), 0)):
        with pytest.raises(RuntimeError) as caught:
            broken[index]
        assert isinstance(caught.value, DataError)


FAKE_TORCHVISION = {
    "torchvision/__init__.py": "",
    "torchvision/datasets/__init__.py": "",
    "torchvision/datasets/vision.py": """
from torch.utils.data import Dataset
class VisionDataset(Dataset):
    def __init__(self, root, transforms=None, transform=None, target_transform=None): ...
    def __repr__(self): return f"{type(self).__name__} of {self.root}: {self.transforms}"
""",
    "torchvision/transforms/__init__.py": """
from torch import nn
class Compose:
    def __init__(self, transforms): raise NotImplementedError
class ToTensor:
    def __init__(self): ...
class Normalize(nn.Module):
    def __init__(self, mean, std, inplace=False): raise NotImplementedError
class RandomApply(nn.Module):
    def __init__(self, transforms, p=0.5): raise NotImplementedError
""",
}
KEEPS_BASES = """
import random, sys
import numpy as np, torch
from PIL import Image
from dinov2.data import transforms as ours
from dinov2.data.datasets import ExtendedVisionDataset, ImageNet
image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8))
made = ours.make_classification_eval_transform(resize_size=16, crop_size=16), ours.GaussianBlur(p=0.0)
if sys.argv[1] == "with":
    from torchvision import transforms as theirs
    from torchvision.datasets.vision import VisionDataset
    assert issubclass(ImageNet, VisionDataset) and isinstance(made[1], theirs.RandomApply)
    assert isinstance(made[0], theirs.Compose) and isinstance(made[0].transforms[-1], theirs.Normalize)
    assert isinstance(made[0].transforms[-2], theirs.ToTensor)
    print(repr(ExtendedVisionDataset("here", transform=str)).split(":")[0], file=sys.stderr)
print(made[0](image).double().sum().item(), np.asarray(made[1](image, random.Random(0))).sum())
"""


@pytest.mark.parametrize("built_for", ["this torch", "another torch"])
def test_torchvisions_base_classes_if_it_is_installed(built_for, site, tmp_path):  # noqa: F811
    fake = tmp_path / "torchvision for tests"
    for name, text in FAKE_TORCHVISION.items():
        (fake / name).parent.mkdir(parents=True, exist_ok=True)
        (fake / name).write_text(text)
    if built_for == "another torch":
        text = "raise RuntimeError('operator torchvision::nms does not exist')"
        (fake / "torchvision" / "__init__.py").write_text(text)

    def run(*path, kind):
        command = [sys.executable, "-B", "-c", KEEPS_BASES, kind]
        environment = {"PYTHONPATH": ":".join(map(str, path))}
        done = subprocess.run(command, cwd=site, capture_output=True, text=True, timeout=600, env=environment)
        assert done.returncode == 0, done.stderr
        return done

    done = run(site, fake, kind="with" if built_for == "this torch" else "broken")
    if built_for == "this torch":
        assert done.stderr.strip() == "ExtendedVisionDataset of here"
    assert done.stdout == run(site, kind="without").stdout


# models


@pytest.mark.parametrize("chunks", [0, 2])
def test_intermediate_layers_by_their_private_names(oracle_root, chunks):
    oracle = load_oracle(oracle_root)
    options = {"patch_size": 8, "img_size": 32, "block_chunks": chunks, "init_values": 1.0}
    torch.manual_seed(0)
    ours, theirs = (module.vit_small(**options).eval() for module in (vision_transformer, oracle.vits))
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 3, 32, 32)
    name = f"_get_intermediate_layers_{'chunked' if chunks else 'not_chunked'}"
    with torch.no_grad():
        for n in (2, [0, 5]):
            torch.testing.assert_close(getattr(ours, name)(x, n), getattr(theirs, name)(x, n), atol=1e-4, rtol=1e-4)
    setattr(ours, name, lambda x, n=1: [torch.zeros(2, 17, 384)])
    assert not ours.get_intermediate_layers(x, norm=False)[0].any()


@pytest.mark.parametrize("kind", [Attention, MemEffAttention])
def test_attention_of_a_text_tower(kind):
    torch.manual_seed(0)
    attention, x = kind(64, num_heads=4, qkv_bias=True), torch.randn(2, 7, 64)
    assert attention.dim == 64
    attention.init_weights(init_proj_std=0.5)
    assert float(attention.qkv.weight.detach().std()) == pytest.approx(1 / 8, rel=0.05)
    assert float(attention.proj.weight.detach().std()) == pytest.approx(0.5, rel=0.05)
    assert not attention.qkv.bias.any() and not attention.proj.bias.any()
    whole = Attention.forward(attention, x, is_causal=True)
    for length in (1, 4, 7):  # later entries are ignored
        last = attention(x[:, :length])[:, -1]
        torch.testing.assert_close(whole[:, length - 1], last, atol=1e-4, rtol=1e-4)


def test_hub_names(monkeypatch):
    assert hub_utils._make_dinov2_model_name("vit_base", 14) == "dinov2_vitb14"
    assert hub_utils._make_dinov2_model_name("vit_large", 14, 4) == "dinov2_vitl14_reg4"
    assert hub_utils._DINOV2_BASE_URL == "https://dl.fbaipublicfiles.com/dinov2"
    with torch.device("meta"):
        options = {"pretrained": False, "interpolate_antialias": True, "interpolate_offset": 0.0}
        model = backbones._make_dinov2_model(arch_name="vit_small", num_register_tokens=4, **options)
        expected = backbones.dinov2_vits14_reg(pretrained=False)
    assert {k: v.shape for k, v in model.state_dict().items()} == {k: v.shape for k, v in expected.state_dict().items()}
    assert isinstance(classifiers.dinov2_vits14_lc(pretrained=False), classifiers._LinearClassifierWrapper)


# training


def raw_config(oracle_root):
    """Upstream's whole default configuration as returned by its loader, for a tiny model."""
    tiny = ["student.arch=vit_nano", "student.patch_size=4", "crops.global_crops_size=16", "crops.local_crops_size=8"]
    tiny += ["dino.head_n_prototypes=32", "ibot.head_n_prototypes=24", "ibot.separate_head=true"]
    tiny += ["crops.local_crops_number=2", "train.batch_size_per_gpu=2", "train.OFFICIAL_EPOCH_LENGTH=2"]
    raw = OmegaConf.load(oracle_root / "dinov2" / "configs" / "ssl_default_config.yaml")
    return OmegaConf.merge(raw, OmegaConf.from_dotlist(tiny))


def test_upstreams_raw_configuration_builds_and_trains(oracle_root, tmp_path):
    cfg = raw_config(oracle_root)
    cfg.train.output_dir = str(tmp_path)
    model = SSLMetaArch(cfg)
    assert (model.dino_loss_weight, model.ibot_loss_weight) == (1.0, 1.0)
    assert (model.dino_out_dim, model.ibot_out_dim) == (32, 24)
    model.prepare_for_distributed_training()
    model.train()
    optimizer, schedules = build_optimizer(cfg, model.get_params_groups()), build_schedulers(cfg)
    apply_optim_scheduler(optimizer, *(schedule[0] for schedule in (schedules[0], schedules[1], schedules[4])))
    batch = random_batch(cfg)
    for name in ("collated_global_crops", "collated_local_crops"):
        batch[name] = batch[name].half()  # as upstream's loop collates
    losses = model.forward_backward(batch, teacher_temp=schedules[3][0])
    assert all(loss.isfinite() for loss in losses.values()) and len(losses) == 4
    norms = [part.clip_grad_norm_(0.5) for part in model.student.values()]
    assert [float(n) for n in norms] == pytest.approx([float(n) for n in norms]) and min(norms) > 0
    for part in model.student.values():
        assert float(part.clip_grad_norm_(0.5)) <= 0.5 + 1e-4
    optimizer.step()
    model.need_to_synchronize_fsdp_streams = True
    model.fsdp_synchronize_streams()
    assert do_test(cfg, model, "training_0") == tmp_path / "eval" / "training_0" / "teacher_checkpoint.pth"


def test_a_loss_weight_set_on_the_model_takes_effect():
    def gradient(**weights):
        model = SSLMetaArch(tiny_config("dino.koleo_loss_weight=0")).train()
        for name, value in weights.items():
            setattr(model, name, value)
        model.forward_backward(random_batch(model.cfg), 0.05)
        return model.student["dino_head"].last_layer.weight_v.grad

    both, dino = gradient(), gradient(ibot_loss_weight=0.0)
    torch.testing.assert_close(both - dino, gradient(dino_loss_weight=0.0), atol=1e-6, rtol=1e-4)
    assert dino.any() and not torch.equal(both, dino)


def test_weights_to_start_from_are_loaded_for_a_loop_that_does_not(tmp_path):
    source = SSLMetaArch(tiny_config("train.seed=1"))
    torch.save({"teacher": source.teacher.state_dict()}, tmp_path / "start.pth")
    model = SSLMetaArch(tiny_config(f"student.pretrained_weights={tmp_path / 'start.pth'}"))
    model.prepare_for_distributed_training()
    for side in (model.student, model.teacher):
        assert torch.equal(side.backbone.pos_embed, source.teacher.backbone.pos_embed)


AVERAGES = """
import json, sys, torch
from dinov2_custom import distributed
from dinov2_custom.train.ssl_meta_arch import SSLMetaArch
from tests.train.batches import random_batch, tiny_config
distributed.enable()
cfg = tiny_config("train.view_groups=4", "dino.koleo_loss_weight=0")
def gradients(averages):
    model = SSLMetaArch(cfg).train()
    model.prepare_for_distributed_training()
    assert model.averages_gradients
    model.averages_gradients = averages
    model.forward_backward(random_batch(cfg, seed=distributed.get_global_rank()), 0.05, torch.Generator())
    return torch.cat([p.grad.flatten() for p in model.student.parameters() if p.grad is not None])
own, mean = gradients(False), gradients(True)
expected = distributed.all_reduce(own.clone(), average=True)
facts = {"error": (mean - expected).abs().max().item(), "apart": (own - mean).abs().max().item()}
open(f"{sys.argv[1]}/{distributed.get_global_rank()}.json", "w").write(json.dumps(facts))
distributed.disable()
"""


def test_gradients_are_averaged_for_a_loop_that_does_not(tmp_path):
    for facts in facts_of_two(tmp_path, AVERAGES):
        assert facts["error"] < 1e-6 < facts["apart"]


def test_fsdp_checkpointer_takes_what_fvcores_does(tmp_path):
    model = torch.nn.Linear(2, 2)
    FSDPCheckpointer(model, tmp_path, save_to_disk=False).save("model")
    assert list(tmp_path.iterdir()) == []
    checkpointer = FSDPCheckpointer(model, tmp_path, save_to_disk=True)
    checkpointer.add_checkpointable("optimizer", torch.optim.SGD(model.parameters()))
    checkpointer.save("model_final", iteration=1)
    assert checkpointer.get_all_checkpoint_files() == [str(tmp_path / "model_final.pth")]


# evaluation


def test_metrics_are_torchmetrics():
    from torchmetrics import MetricCollection

    metric = build_metric(MetricType.MEAN_ACCURACY, num_classes=torch.tensor(3), ks=(1, 2))
    assert isinstance(metric, MetricCollection) and [name for name, _ in metric.items()] == ["top-1", "top-2"]
    other = metric.clone().to("cpu")
    other.update(preds=torch.eye(3), target=torch.arange(3))
    other.update(preds=torch.eye(3), target=torch.tensor([1, 1, 1]))
    accuracies = {name: float(value) for name, value in other.compute().items()}
    assert accuracies == pytest.approx({"top-1": 4 / 6, "top-2": 5 / 6})
    other.reset()
    other.update(preds=torch.eye(3), target=torch.tensor([1, 2, 0]))
    assert float(other.compute()["top-1"]) == 0.0


def test_model_for_evaluation_from_upstreams_arguments(tmp_path):
    _, model, weights = make_run(tmp_path / "run")
    args = argparse.Namespace(
        config_file=str(tmp_path / "run" / "config.yaml"),
        pretrained_weights=str(weights),
        output_dir=str(tmp_path / "out"),
        opts=[],
    )
    try:
        backbone, dtype = setup_and_build_model(args)
        assert dtype == torch.float32 and distributed.is_enabled()  # upstream's code calls torch.distributed
    finally:
        distributed.disable()
        remove_logging("dinov2")
    assert torch.equal(backbone.pos_embed, model.teacher.backbone.pos_embed)
