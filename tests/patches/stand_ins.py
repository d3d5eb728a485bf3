"""Minimal stand-ins for imports of an upstream checkout that these tests lack: torchvision, fvcore and submitit,
and the adaptations to a machine without CUDA. xformers has no stand-in, as a patch replaces it.
"""

from __future__ import annotations

import contextlib
import enum
import logging
import os
import random
from types import ModuleType, SimpleNamespace

import numpy as np
import torch
from PIL import Image, ImageOps


class _Compose:
    def __init__(self, transforms):
        self.transforms = transforms

    def __call__(self, image):
        for transform in self.transforms:
            image = transform(image)
        return image


class _RandomApply(_Compose):
    def __init__(self, transforms, p=0.5):
        super().__init__(transforms)
        self.p = p

    def __call__(self, image):
        return super().__call__(image) if random.random() < self.p else image


class _RandomResizedCrop:
    def __init__(self, size, scale=(0.08, 1.0), interpolation=None):
        self.size, self.scale = size, scale

    def __call__(self, image):
        side = max(1, int(min(image.size) * random.uniform(*self.scale) ** 0.5))
        left, top = (random.randint(0, length - side) for length in image.size)
        return image.crop((left, top, left + side, top + side)).resize((self.size, self.size))


class _ToTensor:
    def __call__(self, image):
        return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255


class _Normalize:
    def __init__(self, mean, std):
        self.mean, self.std = torch.tensor(mean)[:, None, None], torch.tensor(std)[:, None, None]

    def __call__(self, tensor):
        return (tensor - self.mean) / self.std


def _occasional(change):
    class Occasional:
        def __init__(self, p=1.0, **_):
            self.p = p

        def __call__(self, image):
            return change(image) if random.random() < self.p else image

    return Occasional


class _VisionDataset(torch.utils.data.Dataset):
    def __init__(self, root=None, transforms=None, transform=None, target_transform=None):
        self.root, self.transform, self.target_transform = root, transform, target_transform
        self.transforms = transforms or self._both

    def _both(self, image, target):
        image = self.transform(image) if self.transform else image
        return image, self.target_transform(target) if self.target_transform else target


class _Checkpointer:
    """One file per save, as in fvcore: the model's state, that of the checkpointables, and plain values."""

    def __init__(self, model, save_dir="", *, save_to_disk=True, **checkpointables):
        self.model, self.save_dir, self.save_to_disk, self.checkpointables = (
            model,
            save_dir,
            save_to_disk,
            checkpointables,
        )
        self.logger = logging.getLogger("dinov2")
        self.path_manager = SimpleNamespace(open=open, exists=os.path.exists)

    def resume_or_load(self, path, *, resume=True):
        return self.load(self.get_checkpoint_file() if resume and self.has_checkpoint() else path)

    def load(self, path):
        if not path:
            return {}
        data = torch.load(path, weights_only=True)
        self.model.load_state_dict(data.pop("model"))
        for name, thing in self.checkpointables.items():
            thing.load_state_dict(data.pop(name))
        return data


class _PeriodicCheckpointer:
    def __init__(self, checkpointer, period, max_iter=None, max_to_keep=None):
        self.checkpointer, self.period, self.max_iter = checkpointer, period, max_iter

    def step(self, iteration):
        if (iteration + 1) % self.period == 0:
            self.checkpointer.save(f"model_{iteration:07d}", iteration=iteration)
        if iteration >= self.max_iter - 1:
            self.checkpointer.save("model_final", iteration=iteration)


def modules() -> dict[str, ModuleType]:
    """Return name -> module, for ``sys.modules``."""
    names = ["torchvision", "torchvision.transforms", "torchvision.datasets", "submitit", "torchmetrics"]
    names += ["fvcore", "fvcore.common", "fvcore.common.checkpoint"]
    made = {name: ModuleType(name) for name in names}
    for name, module in made.items():
        module.__path__ = []
        if "." in name:
            parent, child = name.rsplit(".", 1)
            setattr(made[parent], child, module)
    vars(made["torchvision.transforms"]).update(
        Compose=_Compose,
        RandomApply=_RandomApply,
        RandomResizedCrop=_RandomResizedCrop,
        RandomHorizontalFlip=_occasional(ImageOps.mirror),
        ColorJitter=_occasional(lambda image: image),
        RandomGrayscale=_occasional(lambda image: image.convert("L").convert("RGB")),
        GaussianBlur=_occasional(lambda image: image),
        RandomSolarize=_occasional(ImageOps.solarize),
        ToTensor=_ToTensor,
        Normalize=_Normalize,
        InterpolationMode=enum.Enum("InterpolationMode", {"BICUBIC": Image.Resampling.BICUBIC.value}),
    )
    made["torchvision.datasets"].VisionDataset = _VisionDataset
    checkpoint = made["fvcore.common.checkpoint"]
    checkpoint.Checkpointer, checkpoint.PeriodicCheckpointer = _Checkpointer, _PeriodicCheckpointer
    return made


class _TorchWithoutHalf(ModuleType):
    half = torch.float32  # the type that upstream's loop asks its batches to have

    def __getattr__(self, name):
        return getattr(torch, name)


class _NoFSDP:
    @staticmethod
    def state_dict_type(*_):
        return contextlib.nullcontext()

    @staticmethod
    def fsdp_modules(module):
        return []


def adapt_to_cpu() -> None:
    """Permanently rebind, in this process, the CUDA calls of upstream's training; run it in a separate process."""
    torch.Tensor.cuda = lambda self, **_: self.clone()
    torch.nn.Module.to = lambda self, *_, **__: self
    torch.cuda.synchronize = lambda: None
    import dinov2.distributed
    import dinov2.fsdp
    import dinov2.train.ssl_meta_arch as arch
    import dinov2.train.train as loop

    loop.torch = _TorchWithoutHalf("torch")

    dinov2.distributed.enable = lambda **_: None
    dinov2.fsdp.FSDP = _NoFSDP

    def with_clip(module):
        module.clip_grad_norm_ = lambda norm: torch.nn.utils.clip_grad_norm_(module.parameters(), norm)
        return module

    arch.get_fsdp_wrapper = lambda model_cfg, modules_to_wrap=(): with_clip
    arch.get_fsdp_modules = lambda module: [SimpleNamespace(params=list(module.parameters()))]
    arch.ShardedGradScaler = lambda: None
