"""Student, teacher and losses of DINOv2: one training step as named stages.

``forward_backward`` = ``teacher_targets``, then for each group of views ``student_features`` -> ``losses`` ->
``backprop_loss``. Not in here: the optimizer, schedules, data, checkpoints. Parameters are float32; each part computes
in the precision that its ``compute_precision`` section names, losses in float32.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from dinov2_custom import distributed
from dinov2_custom.layers.drop_path import Draw
from dinov2_custom.loss import DINOLoss, KoLeoLoss, iBOTPatchLoss
from dinov2_custom.models import build_heads, build_model_from_cfg
from dinov2_custom.parallel import own_share
from dinov2_custom.train import compiling
from dinov2_custom.train.constant_shapes import pad_patches
from dinov2_custom.train.targets import LOSS_NAMES, Features, Targets, assignment_entropies, teacher_assignments
from dinov2_custom.train.terms import Terms, chunked_terms, dense_terms
from dinov2_custom.train.view_groups import ViewGroup, Views, cut_draws, cut_views, group_views
from dinov2_custom.utils.dtype import resolve_dtype
from dinov2_custom.utils.param_groups import fuse_params_groups, get_params_groups_with_decay
from dinov2_custom.utils.rng import seed_for
from dinov2_custom.utils.transfer import to_device

__all__ = ["Features", "SSLMetaArch", "Targets", "assignment_entropies"]


class SSLMetaArch(nn.Module):
    """Hold ``student`` and ``teacher`` (backbone, dino_head[, ibot_head]) and compute gradients for a batch.

    Raises:
        ConfigError: an architecture that does not exist.
    """

    def __init__(self, cfg) -> None:
        super().__init__()
        self.cfg = cfg
        self.do_dino = cfg.dino.loss_weight > 0
        self.do_koleo = cfg.dino.koleo_loss_weight > 0
        self.do_ibot = cfg.ibot.loss_weight > 0
        self.ibot_separate_head = self.do_ibot and cfg.ibot.separate_head
        self.num_local_crops = cfg.crops.local_crops_number
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed_for(cfg.train.seed, "weights"))
            student_backbone, teacher_backbone, self.embed_dim = build_model_from_cfg(cfg)
            self.student = nn.ModuleDict({"backbone": student_backbone, **build_heads(cfg, self.embed_dim)})
            self.teacher = nn.ModuleDict({"backbone": teacher_backbone, **build_heads(cfg, self.embed_dim)})
        self.teacher.load_state_dict(self.student.state_dict())
        self.teacher.requires_grad_(False)
        self.dino_loss = DINOLoss(cfg.dino.head_n_prototypes)
        patch_head = cfg.ibot if self.ibot_separate_head else cfg.dino
        self.ibot_patch_loss = iBOTPatchLoss(patch_head.head_n_prototypes)
        self.num_prototypes = (cfg.dino if self.do_dino else patch_head).head_n_prototypes
        self.koleo_loss = KoLeoLoss(over_all_ranks=cfg.dino.koleo_neighbours == "all")
        self.patch_head = "ibot_head" if self.ibot_separate_head else "dino_head"
        self.lean = cfg.train.lean
        for block in (block for model in (self.student, self.teacher) for block in model["backbone"].all_blocks()):
            block.lean = self.lean and block.can_be_lean()
        self.fp16_scaler: torch.amp.GradScaler | None = None
        self.constant_shapes = False  # or True: each batch gets rows of padding, see ``pad_patches``
        self.diagnose = False
        self.diagnostics: dict[str, Tensor] = {}

    @property
    def device(self) -> torch.device:
        return self.student["backbone"].cls_token.device

    def prepare_for_distributed_training(self) -> None:
        """Fix precision and checkpointing for the device the parameters are on; call once, after moving the model."""
        dtype = self.precision("student", "backbone")
        use_scaler = self.cfg.compute_precision.grad_scaler and dtype == torch.float16
        self.fp16_scaler = distributed.make_grad_scaler(self.device.type) if use_scaler else None
        self.set_checkpointing(self._choose_checkpointing())
        compiled = compiling.is_wanted(self.cfg.train.compile) and compiling.compile_step(self)
        self.constant_shapes = compiled or self.device.type == "cuda"

    def _choose_checkpointing(self) -> str:
        wanted = self.cfg.train.activation_checkpointing
        if wanted != "auto" or self.device.type != "cuda":
            return "none" if wanted == "auto" else wanted
        from dinov2_custom.train.memory import least_checkpointing, memory_for_steps  # which runs this class

        return least_checkpointing(self.cfg, available=memory_for_steps(self))

    def set_checkpointing(self, mode: str) -> None:
        """Let the student's blocks compute ``none``, ``selective`` or ``full`` again in the backward pass."""
        for block in self.student["backbone"].all_blocks():
            block.recompute = mode

    def train(self, mode: bool = True) -> SSLMetaArch:
        """Put the student in training mode; the teacher always stays in evaluation mode."""
        super().train(mode)
        self.teacher.eval()
        return self

    def forward(self, inputs):
        raise NotImplementedError("call forward_backward, or student.backbone / teacher.backbone for features")

    def forward_backward(
        self,
        images: dict,
        teacher_temp: float,
        generator: torch.Generator | None = None,
        micro_batch: tuple[int, int] = (0, 1),
        on_last_backward: Callable[[], None] | None = None,
    ) -> dict[str, Tensor]:
        """Compute the losses of one batch and add their gradients to the student's parameters.

        The student's views are forwarded and backwarded group by group (``train.view_groups``); neither the losses nor
        the gradients depend on the groups, but for rounding.

        Args:
            images: what ``collate_data_and_cast`` returns.
            teacher_temp: temperature of the teacher's softmax or Sinkhorn-Knopp.
            generator: CPU generator of the drop-path subsets (None: torch's global one).
            micro_batch: (index, count) when ``count`` batches make one step: gradients are divided by ``count``, and
                the centres move once a step.
            on_last_backward: called right before the last of this call's backward passes.

        Returns:
            0-dim losses on the device, detached. KoLeo and iBOT are half of what is trained, as upstream reports them.
        """
        groups = self.plan_groups(images, generator)
        masked_in_first = self.masked_in_first(images)
        if self.constant_shapes:
            apart = any(len(group.global_views) == 1 for group, _ in groups)
            images, masked_in_first = pad_patches(images, masked_in_first, apart)
        images = {name: to_device(v, self.device) if isinstance(v, Tensor) else v for name, v in images.items()}
        index, count = micro_batch
        self.dino_loss.hold_center = self.ibot_patch_loss.hold_center = index > 0
        targets = self.teacher_targets(images, teacher_temp)
        reported: dict[str, Tensor] = {}
        for group, draws in groups:
            views = cut_views(images, group, masked_in_first)
            features = self.student_features(views, draws)
            total, terms = self.losses(features, targets, group, views)
            if group is groups[-1][0] and on_last_backward is not None:
                on_last_backward()
            self.backprop_loss(total / count)
            del features, total  # before the next group's
            for name, value in terms.items():
                reported[name] = reported[name] + value.detach() if name in reported else value.detach()
        return {name: reported[name] for name in LOSS_NAMES if name in reported}

    def masked_in_first(self, images: dict) -> int:
        """Return how many patches of the first global crops are masked (waits for the device if they are there)."""
        return int(images["collated_masks"].chunk(2)[0].sum())

    def plan_groups(self, images: dict, generator: torch.Generator | None) -> list[tuple[ViewGroup, list[Draw]]]:
        """Return the groups, each with its part of the drop-path draws over all global and all local crops."""
        backbone, batch_size = self.student["backbone"], len(images["collated_global_crops"]) // 2
        crops = [images["collated_global_crops"], *([images["collated_local_crops"]] if self.num_local_crops else [])]
        tokens = [batch_size * backbone.num_tokens_of(crop) for crop in crops]
        groups = group_views(
            self.cfg.train.view_groups,
            self.num_local_crops if self.do_dino else 0,  # else nothing looks at local crops
            tokens[0],
            tokens[-1],
            backbone.embed_dim * backbone.n_blocks,
            self.device.type,
        )
        draws = backbone.draw([len(crop) for crop in crops], generator)
        return [(group, cut_draws(draws, group, batch_size)) for group in groups]

    @torch.no_grad()
    def teacher_targets(self, images: dict, teacher_temp: float) -> Targets:
        """Turn the unmasked global crops into target probabilities."""
        if not (self.do_dino or self.do_ibot):
            return Targets(None, None)
        with self.autocast("teacher", "backbone"):
            features = self.teacher["backbone"](images["collated_global_crops"], is_training=True)
        first, second = features["x_norm_clstoken"].chunk(2)
        cls = torch.cat((second, first))  # swapped: each crop's target is the other crop
        patches = self._masked_patches(features, images["mask_indices_list"])
        targets = self.assign(cls if self.do_dino else None, patches, images, teacher_temp)
        if self.diagnose:
            self.diagnostics = assignment_entropies(targets)
        return targets

    def assign(self, cls: Tensor | None, patches: Tensor | None, images: dict, teacher_temp: float) -> Targets:
        """Turn the teacher's features into targets by the configured centering."""
        return teacher_assignments(self, cls, patches, images, teacher_temp)

    def student_features(self, views: Views, draws: list[Draw]) -> Features:
        """Run a group's masked global crops and local crops through the student in one pass."""
        crops = [(views.global_crops, views.masks), (views.local_crops, None)]
        crops, masks = zip(*((crop, mask) for crop, mask in crops if crop is not None), strict=True)
        with self.autocast("student", "backbone"):
            features = self.student["backbone"](list(crops), masks=list(masks), is_training=True, draws=draws)
        local, of_global = views.local_crops is not None, views.global_crops is not None
        return Features(
            local_cls=features[-1]["x_norm_clstoken"] if local else None,
            global_cls=features[0]["x_norm_clstoken"] if of_global else None,
            patches=self._masked_patches(features[0], views.patches) if of_global else None,
        )

    def losses(self, features: Features, targets: Targets, group: ViewGroup, views: Views) -> Terms:
        """Return a group's part of the loss to train on, and of the terms as upstream reports them."""
        terms = chunked_terms if self.lean else dense_terms
        total, reported = terms(self, features, targets, group, views)
        if self.do_koleo and features.global_cls is not None:
            halves = features.global_cls.chunk(len(group.global_views))
            koleo = self.cfg.dino.koleo_loss_weight * sum(self.koleo_loss(half) for half in halves)
            reported["koleo_loss"] = koleo / 2
            total = total + koleo
        return total, reported

    def backprop_loss(self, loss: Tensor) -> None:
        if self.fp16_scaler is not None:
            loss = self.fp16_scaler.scale(loss)
        loss.backward()

    @torch.no_grad()
    def update_teacher(self, m: float, skip: Tensor | None = None) -> None:
        """Move the teacher towards the student: t <- m t + (1 - m) s, over all parameters.

        Where the 0-dim ``skip`` is 1 it stays where it is.
        """
        teacher, student = ([own_share(p) for p in side.parameters()] for side in (self.teacher, self.student))
        if skip is None:
            torch._foreach_lerp_(teacher, student, 1.0 - m)
        else:
            torch._foreach_lerp_(teacher, student, [(1.0 - skip) * (1.0 - m)] * len(teacher))

    def get_params_groups(self) -> list[dict]:
        """Return the optimizer's groups, fused within each part on equal multipliers."""
        return [
            {**group, "is_backbone": name == "backbone"}
            for name, part in self.student.items()
            for group in self.get_maybe_fused_params_for_submodel(part)
        ]

    def get_maybe_fused_params_for_submodel(self, m: nn.Module) -> list[dict]:
        """Return the optimizer's groups of one part of the student."""
        return fuse_params_groups(
            get_params_groups_with_decay(
                m,
                lr_decay_rate=self.cfg.optim.layerwise_decay,
                patch_embed_lr_mult=self.cfg.optim.patch_embed_lr_mult,
            )
        )

    def fsdp_synchronize_streams(self) -> None:
        """Do nothing: no streams of FSDP's own have to wait for each other here. Upstream's name."""

    def precision(self, model: str, part: str) -> torch.dtype:
        """Return the number format in which ``part`` of ``model`` computes."""
        precision = self.cfg.compute_precision[model][part].mixed_precision
        return resolve_dtype(precision.param_dtype, self.device)

    def autocast(self, model: str, part: str) -> AbstractContextManager:
        """Return the region in which ``part`` of ``model`` computes in its configured precision."""
        dtype = self.precision(model, part)
        return torch.autocast(self.device.type, dtype=dtype, enabled=dtype != torch.float32)

    def _masked_patches(self, features: dict, positions: Tensor) -> Tensor | None:
        return features["x_norm_patchtokens"].flatten(0, 1).index_select(0, positions) if self.do_ibot else None

    def run_heads(
        self, model: str, cls_list: list[Tensor], patches: Tensor | None
    ) -> tuple[list[Tensor], Tensor | None]:
        """Return the logits of class tokens and masked patches; they share a pass where they share the head."""
        heads = getattr(self, model)
        shared = cls_list if patches is None or self.ibot_separate_head else [*cls_list, patches]
        logits: list[Tensor] = []
        if shared:
            with self.autocast(model, "dino_head"):
                packed = heads["dino_head"](torch.cat(shared))
            logits = list(packed.split([len(one) for one in shared]))
        if patches is None:
            return logits, None
        if not self.ibot_separate_head:
            return logits[:-1], logits[-1]
        with self.autocast(model, "ibot_head"):
            return logits, heads["ibot_head"](patches)
