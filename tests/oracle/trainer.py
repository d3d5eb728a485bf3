"""Drive upstream's ``SSLMetaArch`` on a CPU in fp32 with its own optimizer: forward, backward, clip, AdamW, EMA.

No global state changes: random generators are put back, and "move to the GPU" is answered by the batch itself instead
of by a patch of ``torch.Tensor``. Read :class:`OracleTrainer` first.
"""

from __future__ import annotations

import contextlib
import random
import warnings
from types import SimpleNamespace

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf


@contextlib.contextmanager
def preserved_rng(seed: int | None = None):
    """Run the body with all global generators seeded, then put back what they were."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    if seed is not None:
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


@contextlib.contextmanager
def reduced_depth(vision_transformer_module, depth: int | None):
    """Make the vit_* factories of a vision_transformer module (upstream's or ours) build ``depth`` blocks."""
    full = vision_transformer_module.DinoVisionTransformer
    if depth is not None:
        vision_transformer_module.DinoVisionTransformer = lambda *args, **kw: full(*args, **{**kw, "depth": depth})
    try:
        yield
    finally:
        vision_transformer_module.DinoVisionTransformer = full


def oracle_config(oracle: SimpleNamespace, overrides: list[str]) -> DictConfig:
    """Return upstream's default configuration with ``key=value`` overrides and its learning-rate rule applied."""
    default = OmegaConf.create(oracle.configs.dinov2_default_config)
    cfg = OmegaConf.merge(default, OmegaConf.from_dotlist(list(overrides)))
    cfg.compute_precision.grad_scaler = False
    oracle.config_utils.apply_scaling_rules_to_cfg(cfg)
    return cfg


def make_batch(oracle: SimpleNamespace, cfg: DictConfig, batch_size: int, seed: int) -> dict:
    """Collate ``batch_size`` random images with upstream's own collate and masks, fp32.

    The crops are smooth and differ from sample to sample in level and contrast, so that their features are well apart.
    """
    crops, patch = cfg.crops, cfg.student.patch_size
    generator = torch.Generator().manual_seed(seed)
    samples = [
        (
            {
                "global_crops": [_crop(crops.global_crops_size, generator) for _ in range(2)],
                "local_crops": [_crop(crops.local_crops_size, generator) for _ in range(crops.local_crops_number)],
            },
            (),
        )
        for _ in range(batch_size)
    ]
    grid = crops.global_crops_size // patch
    masks = oracle.masking.MaskingGenerator(input_size=(grid, grid), max_num_patches=0.5 * grid * grid)
    with preserved_rng(seed):
        return oracle.collate.collate_data_and_cast(
            samples,
            mask_ratio_tuple=cfg.ibot.mask_ratio_min_max,
            mask_probability=cfg.ibot.mask_sample_probability,
            n_tokens=grid * grid,
            mask_generator=masks,
            dtype=torch.float32,
        )


def _crop(size: int, generator: torch.Generator) -> torch.Tensor:
    coarse = torch.randn(1, 3, 4, 4, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, size=(size, size), mode="bilinear", align_corners=False)[0]
    level, contrast = torch.randn(3, 1, 1, generator=generator), torch.rand(1, generator=generator) + 0.5
    return smooth * contrast + level + 0.3 * torch.randn(3, size, size, generator=generator)


class _Stays:
    """A tensor of the batch: asked to move to the GPU, it hands out a copy (upstream changes some in place)."""

    def __init__(self, tensor: torch.Tensor):
        self.tensor = tensor

    def cuda(self, non_blocking: bool = False) -> torch.Tensor:
        return self.tensor.clone()


class OracleTrainer:
    """Upstream's model and AdamW for one configuration.

    Args:
        oracle: what :func:`tests.oracle.loader.load_oracle` returned.
        overrides: ``key=value`` on top of upstream's default configuration.
        depth: number of transformer blocks instead of the architecture's own.
        seed: of the initial weights.
    """

    def __init__(self, oracle: SimpleNamespace, overrides: list[str], *, depth: int | None = None, seed: int = 0):
        self.oracle = oracle
        self.cfg = oracle_config(oracle, overrides)
        with preserved_rng(seed), reduced_depth(oracle.vits, depth), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.model = oracle.arch.SSLMetaArch(self.cfg)
            self.model.prepare_for_distributed_training()
        self.model.need_to_synchronize_fsdp_streams = False  # CUDA streams of FSDP
        self.model.train()
        self.optimizer = oracle.train.build_optimizer(self.cfg, self.model.get_params_groups())

    def forward_backward(self, batch: dict, teacher_temp: float, seed: int = 0) -> dict[str, torch.Tensor]:
        """Return the loss terms; gradients are left on the student. ``seed`` is that of drop path."""
        images = {key: _Stays(value) if torch.is_tensor(value) else value for key, value in batch.items()}
        with preserved_rng(seed), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            losses = self.model.forward_backward(images, teacher_temp=teacher_temp)
        return {name: loss.detach() for name, loss in losses.items()}

    def train_step(self, batch: dict, iteration: int, schedules: tuple, seed: int = 0) -> dict[str, torch.Tensor]:
        """Do one whole iteration as upstream's loop does it: schedules, losses, clip a module, AdamW, EMA."""
        lr, wd, momentum, teacher_temp, last_layer_lr = (schedule[iteration] for schedule in schedules)
        self.oracle.train.apply_optim_scheduler(self.optimizer, lr, wd, last_layer_lr)
        self.optimizer.zero_grad(set_to_none=True)
        losses = self.forward_backward(batch, teacher_temp, seed)
        if self.cfg.optim.clip_grad:
            for module in self.model.student.values():
                module.clip_grad_norm_(self.cfg.optim.clip_grad)
        self.optimizer.step()
        self.model.update_teacher(momentum)
        return losses
