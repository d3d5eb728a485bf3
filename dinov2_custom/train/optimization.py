"""The optimizer, its schedules, a step's gradients, and an update that a flag on the device can cancel."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from types import SimpleNamespace

import torch
from torch import Tensor

from dinov2_custom.configs.load import with_defaults
from dinov2_custom.parallel import GradientReducer, own_share, whole_tensor
from dinov2_custom.train.course import RunLength, run_length
from dinov2_custom.train.ssl_meta_arch import SSLMetaArch
from dinov2_custom.utils.schedules import CosineScheduler


def build_optimizer(cfg, params_groups: Iterable[dict]) -> torch.optim.AdamW:
    """Build AdamW over ``params_groups``; their lr and weight decay are set by :func:`apply_optim_scheduler`.

    Only the fused kernels accept a device flag that cancels the update; see :func:`step_unless`.
    """
    return torch.optim.AdamW(params_groups, betas=(cfg.optim.adamw_beta1, cfg.optim.adamw_beta2), fused=True)


def build_schedulers(cfg, length: RunLength | None = None):
    """Return (lr, weight decay, momentum, teacher temperature, last layer's lr), each indexed by iteration.

    In a run limited by time the index is ``Course.position``.

    ``length`` is needed if ``train.OFFICIAL_EPOCH_LENGTH`` is ``auto``; otherwise it follows from the configuration.
    """
    cfg = with_defaults(cfg)
    length = length or run_length(cfg, num_images=1, world_size=1)
    lr = {
        "base_value": cfg.optim.lr,
        "final_value": cfg.optim.min_lr,
        "total_iters": length.total,
        "warmup_iters": length.iterations(cfg.optim.warmup_epochs),
        "start_warmup_value": 0,
    }
    lr_schedule, last_layer_lr_schedule = CosineScheduler(**lr), CosineScheduler(**lr)
    last_layer_lr_schedule.schedule[: length.iterations(cfg.optim.freeze_last_layer_epochs)] = 0
    wd_schedule = CosineScheduler(
        base_value=cfg.optim.weight_decay, final_value=cfg.optim.weight_decay_end, total_iters=length.total
    )
    momentum_schedule = CosineScheduler(
        base_value=cfg.teacher.momentum_teacher,
        final_value=cfg.teacher.final_momentum_teacher,
        total_iters=length.total,
    )
    temp_warmup = length.iterations(cfg.teacher.warmup_teacher_temp_epochs)
    teacher_temp_schedule = CosineScheduler(
        base_value=cfg.teacher.teacher_temp,
        final_value=cfg.teacher.teacher_temp,
        total_iters=temp_warmup,
        warmup_iters=temp_warmup,
        start_warmup_value=cfg.teacher.warmup_teacher_temp,
    )
    return lr_schedule, wd_schedule, momentum_schedule, teacher_temp_schedule, last_layer_lr_schedule


def apply_optim_scheduler(
    optimizer, lr: float, wd: float, last_layer_lr: float, *, frozen_backbone: bool = False
) -> None:
    """Write this iteration's lr and weight decay into every group, in place, scaled by the group's multipliers.

    ``frozen_backbone``: set the backbone's lr to 0, so that its weights stay bitwise equal while AdamW's moments build
    up.
    """
    for group in optimizer.param_groups:
        group["weight_decay"] = wd * group["wd_multiplier"]
        group["lr"] = (last_layer_lr if group["is_last_layer"] else lr) * group["lr_multiplier"]
        if frozen_backbone and group["is_backbone"]:
            group["lr"] = 0.0


def accumulate_gradients(
    cfg,
    model: SSLMetaArch,
    reducer: GradientReducer,
    batch: dict,
    batches: Iterator[dict],
    teacher_temp: float,
    generator: torch.Generator,
) -> dict[str, Tensor]:
    """Run ``batch``, then batches from ``batches`` up to ``optim.accumulation_steps``; return their mean losses."""
    count, sums = cfg.optim.accumulation_steps, {}
    for index in range(count):
        if index > 0:
            batch = next(batches)
        arm = reducer.arm if index == count - 1 else None
        losses = model.forward_backward(batch, teacher_temp, generator, (index, count), on_last_backward=arm)
        sums = {name: sums.get(name, 0.0) + value for name, value in losses.items()}
    reducer.finish()
    return {name: value / count for name, value in sums.items()}


def clip_gradients(cfg, model, optimizer) -> dict[str, Tensor]:
    """Undo the loss scale, clip each part's gradient to ``optim.clip_grad`` and return the norms before clipping."""
    if model.fp16_scaler is not None:
        unscale(model.fp16_scaler, optimizer)
    largest = cfg.optim.clip_grad or float("inf")
    return {
        f"grad_norm_{name}": whole_tensor(torch.nn.utils.clip_grad_norm_(part.parameters(), largest))
        for name, part in model.student.items()
    }


@torch.no_grad()
def weight_norm(part: torch.nn.Module) -> Tensor:
    """Return the norm of all weights of ``part``, 0-dim, also if they are sharded over processes."""
    return whole_tensor(torch.nn.utils.get_total_norm(list(part.parameters())))


@torch.no_grad()
def unscale(scaler: torch.amp.GradScaler, optimizer: torch.optim.Optimizer) -> None:
    """Divide this process's shards of the gradients by the loss scale, in place.

    Torch's kernel does not accept sharded and whole gradients together, which occur if a backbone is sharded and its
    head not.
    """
    shares = []
    for parameter in (p for group in optimizer.param_groups for p in group["params"]):
        if parameter.grad is not None:
            shares.append(own_share(parameter).detach())
            shares[-1].grad = own_share(parameter.grad)
    scaler.unscale_(SimpleNamespace(param_groups=[{"params": shares}]))  # the only attribute that it reads


@torch.no_grad()
def step_unless(skip: Tensor, model, optimizer, momentum: float) -> None:
    """Update student and teacher; if the 0-dim ``skip`` on their device is 1, leave all state bitwise unchanged.

    This covers weights, AdamW's moments and step counts, the teacher and the centres. A loss scale is lowered. The host
    does not wait for the flag.

    Source: ``found_inf`` is how torch.amp.GradScaler passes an overflow to fused optimizers.
    """
    optimizer.grad_scale, optimizer.found_inf = None, skip
    optimizer.step()
    if model.fp16_scaler is not None:
        model.fp16_scaler.update()
    model.update_teacher(momentum, skip=skip)
    for loss in (model.dino_loss, model.ibot_patch_loss):
        loss.cancel_center_update(where=skip)
