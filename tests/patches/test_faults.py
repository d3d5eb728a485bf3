"""Each fault and its error on upstream's unchanged code, and the same code with the patch applied."""

from __future__ import annotations

import argparse
import os
import random
import re
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image

from dinov2_custom.errors import CheckpointError, ConfigError, DataError
from tests import processes
from tests.oracle import reduced_depth
from tests.patches.world import patched, world
from tests.processes import ENVIRONMENT, REPOSITORY

SMALL = {
    "student": {"arch": "vit_small", "patch_size": 14, "block_chunks": 0},
    "crops": {"global_crops_size": 28, "local_crops_size": 14},
    "dino": {"head_n_prototypes": 16, "head_hidden_dim": 16, "head_bottleneck_dim": 8},
    "train": {"centering": "centering"},
}


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "images"
    (folder / "nested").mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 255, (12, 20, 20, 3), dtype=np.uint8)
    for number, one in enumerate(pixels):
        Image.fromarray(one).save(folder / "nested" / f"{number:02}.png")
    return folder


def config(configs, **more):
    from omegaconf import OmegaConf

    return OmegaConf.merge(OmegaConf.create(configs.dinov2_default_config), SMALL, more)


def test_no_xformers(checkout):
    with world(checkout) as load, pytest.raises(AssertionError, match="xFormers is required for DINOv2 training"):
        load("train.ssl_meta_arch")
    patched(checkout, "no_xformers")
    generator = torch.Generator().manual_seed(0)
    crops = [torch.randn(2, 3, 28, 28, generator=generator), torch.randn(3, 3, 14, 14, generator=generator)]
    with world(checkout) as load:
        load("train.ssl_meta_arch")
        assert "xformers" not in sys.modules
        vits = load("models.vision_transformer")
        with reduced_depth(vits, 2):
            model = vits.vit_small(patch_size=14, img_size=28, block_chunks=0, init_values=1.0, drop_path_rate=0.4)
        with torch.inference_mode():
            together = model.eval()(crops, masks=[None, None], is_training=True)
            for crop, one in zip(crops, together, strict=True):
                torch.testing.assert_close(one["x_prenorm"], model(crop, is_training=True)["x_prenorm"])
        features = model.train()(crops, masks=[None, None], is_training=True)
        sum(one["x_norm_clstoken"].square().mean() for one in features).backward()
    assert all(p.grad.isfinite().all() for name, p in model.named_parameters() if name != "mask_token")


def old_xformers():
    """The two kernels as in xformers 0.0.22 on a GPU: half precision and multiples of 256 only."""
    from dinov2_custom.patching import packed

    def refuse(x):
        if x.shape[-1] % 256:
            raise RuntimeError("Expected source.size(1) % kNumElementsPerBlock == 0 to be true")
        raise RuntimeError("Half only")

    made = {name: ModuleType(name) for name in ("xformers", "xformers.ops")}
    made["xformers"].__path__, made["xformers"].ops = [], made["xformers.ops"]
    vars(made["xformers.ops"]).update(
        fmha=packed.fmha,
        memory_efficient_attention=packed.memory_efficient_attention,
        unbind=torch.unbind,
        index_select_cat=lambda sources, indices: refuse(sources[0]),
        scaled_index_add=lambda x, *_, **__: refuse(x),
    )
    return made


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_width(checkout, dtype):
    def train(load):
        vits = load("models.vision_transformer")
        with reduced_depth(vits, 2):
            model = vits.vit_small(patch_size=14, img_size=28, block_chunks=0, init_values=1.0, drop_path_rate=0.4)
        model = model.to(dtype)
        crops = [torch.ones(4, 3, 28, 28, dtype=dtype), torch.ones(4, 3, 14, 14, dtype=dtype)]
        return model.train()(crops, masks=[None, None], is_training=True)

    with world(checkout, old_xformers()) as load, pytest.raises(RuntimeError, match="kNumElementsPerBlock == 0"):
        train(load)
    patched(checkout, "every_width")
    with world(checkout, old_xformers()) as load:
        features = train(load)
    assert all(one["x_norm_clstoken"].isfinite().all() for one in features)


def test_fsdp_attributes(checkout):
    def run():
        env = os.environ | ENVIRONMENT | {"PYTHONPATH": f"{checkout}{os.pathsep}{REPOSITORY}"}
        script = str(Path(__file__).with_name("fsdp_processes.py"))
        done = processes.run(script, processes=2, cwd=checkout, environment=env)
        assert done.returncode == 0, done.stderr
        return done.stdout

    patched(checkout, "no_xformers")
    before = run()
    assert re.search("reshard: AttributeError: .* no attribute '_handles'", before)
    assert re.search("synchronize: AttributeError: .* no attribute '_streams'", before)
    patched(checkout, "fsdp_attributes")
    after = run()
    assert "reshard: 288 bytes gathered, 0 after" in after
    assert "synchronize: shared True, needed again False" in after


def test_unlabeled_datasets(checkout, images):
    text = f"ImageFolder:root={images}"
    with world(checkout) as load, pytest.raises(ValueError, match='Unsupported dataset "ImageFolder"'):
        load("data.loaders").make_dataset(dataset_str=text)
    patched(checkout, "unlabeled_datasets")
    with world(checkout) as load:
        make_dataset = load("data").make_dataset
        for dataset_str in (text, str(images), [str(images)], f"ImageDataset:root={images}"):
            dataset = make_dataset(dataset_str=dataset_str, transform=lambda image: image.size, target_transform=str)
            assert len(dataset) == 12 and dataset[3] == ((20, 20), "()")
        with pytest.raises(ValueError, match='Unsupported dataset "SomebodysOwn"'):
            make_dataset(dataset_str="SomebodysOwn:root=/x")
        with pytest.raises(TypeError, match="split"):  # upstream's own class, without its split
            make_dataset(dataset_str=f"ImageNet:root={images}:extra={images}")


def test_skip_bad_images(checkout, images):
    (images / "nested" / "05.png").write_bytes(b"no image")

    def own_dataset(load):
        """A dataset class that a fork adds under its own name."""
        loaders, extended = load("data.loaders"), load("data.datasets.extended")

        class Folder(extended.ExtendedVisionDataset):
            def get_image_data(self, index):
                return sorted((images / "nested").iterdir())[index].read_bytes()

            def get_target(self, index):
                return index

            def __len__(self):
                return 12

        loaders.ImageNet22k = Folder
        options = {"transform": lambda image: "seen", "target_transform": lambda target: target}
        return loaders.make_dataset(dataset_str=f"ImageNet22k:root={images}", **options)

    with world(checkout) as load, pytest.raises(RuntimeError, match="can not read image for sample 5"):
        own_dataset(load)[5]
    patched(checkout, "skip_bad_images")
    with world(checkout) as load:
        dataset = own_dataset(load)
        assert dataset[5] == ("seen", 6) and dataset[4] == ("seen", 4)
        assert list(dataset.bad) == [5] and "cannot identify image file" in dataset.bad[5]
        labelled = load("data.loaders").make_dataset(dataset_str=f"ImageNet22k:root={images}")
        with pytest.raises(RuntimeError, match="can not read image"):
            labelled[5]
        for path in (images / "nested").iterdir():
            path.write_bytes(b"")
        with pytest.raises(DataError, match="expected readable images, got 12 unreadable ones from number 2 on"):
            own_dataset(load)[2]


def test_class_free_collate(checkout):
    crops = [{"global_crops": [torch.full((3, 56, 56), i)] * 2, "local_crops": [torch.ones(3, 14, 14)]} for i in (1, 2)]

    def collate(load, samples):
        data = load("data")
        generator = data.MaskingGenerator(input_size=(4, 4), max_num_patches=8)
        random.seed(3)
        return data.collate_data_and_cast(
            samples, (0.1, 0.5), 0.5, torch.float32, n_tokens=16, mask_generator=generator
        )

    with world(checkout) as load:
        wanted = collate(load, [(crop, ()) for crop in crops])
        with pytest.raises(KeyError, match="0"):
            collate(load, crops)
    patched(checkout, "class_free_collate")
    with world(checkout) as load:
        for samples in (crops, [(crop, ()) for crop in crops]):
            got = collate(load, samples)
            assert got.keys() == wanted.keys()
            assert all(torch.equal(torch.as_tensor(got[k]), torch.as_tensor(wanted[k])) for k in wanted)


def test_output_dir(checkout, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "config.yaml"
    file.write_text(f"train: {{output_dir: {tmp_path}/from_file}}")

    def resolve(load, *opts, output_dir="", **more):
        args = argparse.Namespace(config_file=str(file), opts=list(opts), output_dir=output_dir, **more)
        cfg = load("utils.config").get_cfg_from_args(args)
        assert cfg.train.output_dir == args.output_dir
        return args.output_dir

    cli, flag = f"train.output_dir={tmp_path}/cli", f"{tmp_path}/flag"
    with world(checkout) as load:
        assert {resolve(load), resolve(load, cli), resolve(load, cli, "--output-dir", flag)} == {str(tmp_path)}
    patched(checkout, "output_dir")
    with world(checkout) as load:
        assert resolve(load) == f"{tmp_path}/from_file"
        assert resolve(load, cli) == f"{tmp_path}/cli"
        assert resolve(load, cli, output_dir=flag) == resolve(load, cli, "--output-dir", flag) == flag
        assert resolve(load, f"--output_dir={flag}", "optim.epochs=3") == flag
        assert resolve(load, pretrained_weights="x.pth") == str(tmp_path)  # an evaluation never writes into the run
        with pytest.raises(ConfigError, match="expected a folder after it"):
            resolve(load, "--output-dir")
        submit, seen = load("run.submit"), []
        submit.submitit.AutoExecutor = lambda folder, **_: seen.append(folder) or pytest.skip("submitted")
        args = argparse.Namespace(config_file=str(file), opts=[], output_dir="")
        with pytest.raises(BaseException, match="submitted"):
            submit.submit_jobs(object, args, name="x")
        assert seen == [f"{tmp_path}/from_file"]


def test_epoch_length(checkout, images):
    auto = {"train": {"OFFICIAL_EPOCH_LENGTH": "auto", "dataset_path": str(images), "batch_size_per_gpu": 5}}
    patched(checkout, "no_xformers", "unlabeled_datasets")
    with world(checkout) as load:
        cfg = load("utils.config").apply_scaling_rules_to_cfg(config(load("configs"), **auto))
        with pytest.raises(TypeError):
            load("train.train").build_schedulers(cfg)
        with pytest.raises(AssertionError) as bare:
            load("utils.utils").CosineScheduler(1.0, 0.0, total_iters=5, warmup_iters=10)
        assert not str(bare.value)
        values = load("utils.utils").CosineScheduler(1.0, 0.1, 20, 5, 0.2, 3)
    patched(checkout, "epoch_length")
    with world(checkout) as load:
        rules = load("utils.config").apply_scaling_rules_to_cfg
        cfg = rules(config(load("configs"), optim={"epochs": 4, "warmup_epochs": 2}, **auto))
        assert cfg.train.OFFICIAL_EPOCH_LENGTH == 3
        lr, _, _, temperature, last_layer = load("train.train").build_schedulers(cfg)
        assert len(lr.schedule) == 12 and lr[0] == 0 and lr[5] == pytest.approx(cfg.optim.lr)
        assert last_layer[2] == 0 and temperature[0] == 0.04
        same = load("utils.utils").CosineScheduler(1.0, 0.1, 20, 5, 0.2, 3)
        assert np.array_equal(same.schedule, values.schedule)
        with pytest.raises(ConfigError, match="optim.warmup_epochs: expected at most optim.epochs=2, got 10"):
            rules(config(load("configs"), optim={"epochs": 2}))
        with pytest.raises(ConfigError, match="optim.epochs: expected a whole number, got 0.5"):
            rules(config(load("configs"), optim={"epochs": 0.5}))
        fork = config(load("configs"))  # one that counts epochs differently
        del fork.train.OFFICIAL_EPOCH_LENGTH
        assert rules(fork).optim.epochs == 100


def test_last_teacher(checkout):
    short = {"optim": {"epochs": 2}, "train": {"OFFICIAL_EPOCH_LENGTH": 30}}
    with world(checkout) as load:
        cfg = load("utils.config").apply_scaling_rules_to_cfg(config(load("configs"), **short))
        assert cfg.evaluation.eval_period_iterations == 12500  # never reached in 60 iterations
    patched(checkout, "last_teacher")
    with world(checkout) as load:
        rules, configs = load("utils.config").apply_scaling_rules_to_cfg, load("configs")
        assert rules(config(configs, **short)).evaluation.eval_period_iterations == 60
        assert rules(config(configs)).evaluation.eval_period_iterations == 12500
        assert rules(config(configs, evaluation={"eval_period_iterations": 0}, **short)).evaluation == {
            "eval_period_iterations": 0
        }


def test_exact_resume(checkout):
    def batches(load, start, count):
        """Do as the training loop does: pass the first iteration to the loader as its seed."""
        data = load("data")
        loader = data.make_data_loader(
            dataset=list(range(20)),
            batch_size=4,
            num_workers=0,
            seed=start,
            sampler_type=data.SamplerType.SHARDED_INFINITE,
            sampler_advance=0,
            collate_fn=list,
        )
        return [batch for batch, _ in zip(loader, range(count), strict=False)]

    with world(checkout) as load:
        assert batches(load, 3, 9) != batches(load, 0, 12)[3:]
    patched(checkout, "exact_resume")
    with world(checkout) as load:
        whole = batches(load, 0, 12)
        assert sorted(sum(whole[:5], [])) == sorted(sum(whole[5:10], [])) == list(range(20))
        for start in (1, 3, 7):
            assert batches(load, start, 12 - start) == whole[start:]
        plain = load("data").make_data_loader(dataset=[0] * 8, batch_size=2, num_workers=0, seed=5, sampler_type=None)
        assert plain.generator is None


def test_pretrained_weights(checkout, tmp_path):
    patched(checkout, "no_xformers")
    with world(checkout) as load, reduced_depth(load("models.vision_transformer"), 4):
        make = load("models.vision_transformer").vit_small
        released = make(patch_size=14, img_size=56, init_values=1.0, block_chunks=0)
        chunked = make(patch_size=14, img_size=28, init_values=1.0, block_chunks=2)
        torch.save(released.state_dict(), tmp_path / "released.pth")
        torch.save({"model": chunked.state_dict()}, tmp_path / "chunked.pth")
        torch.save({"teacher": {"other": torch.zeros(1)}}, tmp_path / "others.pth")
        arch, cfg = load("train.ssl_meta_arch"), config(load("configs"))
        cfg.student.pretrained_weights = str(tmp_path / "released.pth")
        with pytest.raises(KeyError, match="model"):
            arch.SSLMetaArch(cfg)
        cfg.student.pretrained_weights = str(tmp_path / "chunked.pth")
        student = arch.SSLMetaArch(cfg).student.backbone  # loads and logs nothing
        assert not torch.equal(student.blocks[3].attn.qkv.weight, chunked.blocks[1][3].attn.qkv.weight)
        load("utils.utils").load_pretrained_weights(student, str(tmp_path / "others.pth"), "teacher")  # nor does this
    patched(checkout, "pretrained_weights")
    with world(checkout) as load, reduced_depth(load("models.vision_transformer"), 4):
        arch = load("train.ssl_meta_arch")
        for name, source in (("released", released.blocks[3]), ("chunked", chunked.blocks[1][3])):
            cfg.student.pretrained_weights = str(tmp_path / f"{name}.pth")
            student = arch.SSLMetaArch(cfg).student.backbone
            assert torch.equal(student.blocks[3].attn.qkv.weight, source.attn.qkv.weight)
            assert cfg.student.pretrained_weights == str(tmp_path / f"{name}.pth")
        with pytest.raises(CheckpointError, match="pretrained_weights: expected the"):
            load("utils.utils").load_pretrained_weights(student, str(tmp_path / "others.pth"), "teacher")


def test_koleo(checkout):
    one = torch.randn(1, 384, dtype=torch.float16)
    several = torch.randn(5, 384)
    with world(checkout) as load:
        loss = load("loss").KoLeoLoss()
        assert loss(one).isinf()
        wanted = loss(several)
    patched(checkout, "koleo")
    with world(checkout) as load:
        loss = load("loss").KoLeoLoss()
        assert loss(one).isfinite()
        torch.testing.assert_close(loss(several), wanted)
