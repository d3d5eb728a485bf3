"""Student, teacher and losses of DINOv2: one training step as named stages.

``forward_backward`` = ``get_teacher_output``, then for each group of views ``get_student_output`` -> ``compute_losses``
-> ``backprop_loss``. Parameters are float32; each part
computes in the precision that its ``compute_precision`` section names, losses in float32.

Heads and their losses are computed in one of two ways that give the same numbers: from all logits at once, through the
loss classes, or a chunk of logits at a time (``train.lean``).
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dinov2_custom import distributed
from dinov2_custom.configs.load import with_defaults
from dinov2_custom.errors import DINOv2Error
from dinov2_custom.layers.backend import without_plans
from dinov2_custom.layers.drop_path import Draw
from dinov2_custom.layers.packed import Packed
from dinov2_custom.layers.pieces import EAGER
from dinov2_custom.layers.prototype_loss import PrototypeJob
from dinov2_custom.loss import DINOLoss, KoLeoLoss, iBOTPatchLoss
from dinov2_custom.loss.sinkhorn import sinkhorn_targets
from dinov2_custom.loss.soft_targets import SoftTargets, TeacherLogits
from dinov2_custom.models import build_heads, build_model_from_cfg
from dinov2_custom.parallel import GradientReducer, own_share
from dinov2_custom.train import fast_paths
from dinov2_custom.train.health import MAX_RANKME_ROWS
from dinov2_custom.train.memory import least_checkpointing, memory_for_steps
from dinov2_custom.train.pretrained import start_from_weights
from dinov2_custom.train.views import (
    ViewGroup,
    Views,
    cut_draws,
    cut_views,
    group_views,
    num_crop_pairs,
    pad_patches,
)
from dinov2_custom.utils.dtype import resolve_dtype
from dinov2_custom.utils.param_groups import fuse_params_groups, get_params_groups_with_decay
from dinov2_custom.utils.rng import seed_for
from dinov2_custom.utils.transfer import to_device

logger = logging.getLogger("dinov2")


LOSS_NAMES = ("dino_local_crops_loss", "dino_global_crops_loss", "koleo_loss", "ibot_loss")
Terms = tuple[Tensor, dict[str, Tensor]]  # (loss to train on, terms as upstream reports them)


class Targets(NamedTuple):
    """Teacher probabilities: ``cls`` (2b, K), the second crop's rows first; ``patches`` (M, K'). None: untrained."""

    cls: Tensor | SoftTargets | None
    patches: Tensor | SoftTargets | None


class Features(NamedTuple):
    """A group's student features: ``local_cls`` (L*b, D), ``global_cls`` (G*b, D) and ``patches`` (M, D) of the masked
    patches; None if not in the group, or not trained."""

    local_cls: Tensor | None
    global_cls: Tensor | None
    patches: Tensor | None


class _HeadWork(NamedTuple):
    """Work of one head: features and jobs in the same order, and the reported name and factor of each job."""

    features: list[Tensor]
    jobs: list[PrototypeJob]
    names: list[tuple[str, float]]


class SSLMetaArch(nn.Module):
    """Hold ``student`` and ``teacher`` (backbone, dino_head[, ibot_head]) and compute gradients for a batch.

    Raises:
        ConfigError: the architecture does not exist.
    """

    def __init__(self, cfg) -> None:
        super().__init__()
        self.cfg = cfg = with_defaults(cfg)
        self.do_dino = cfg.dino.loss_weight > 0
        self.do_koleo = cfg.dino.koleo_loss_weight > 0
        self.do_ibot = cfg.ibot.loss_weight > 0
        self.ibot_separate_head = self.do_ibot and cfg.ibot.separate_head
        self.dino_loss_weight, self.ibot_loss_weight = cfg.dino.loss_weight, cfg.ibot.loss_weight
        self.num_local_crops = cfg.crops.local_crops_number
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed_for(cfg.train.seed, "weights"))
            student_backbone, teacher_backbone, self.embed_dim = build_model_from_cfg(cfg)
            self.student = nn.ModuleDict({"backbone": student_backbone, **build_heads(cfg, self.embed_dim)})
            self.teacher = nn.ModuleDict({"backbone": teacher_backbone, **build_heads(cfg, self.embed_dim)})
        self.teacher.load_state_dict(self.student.state_dict())
        self.teacher.requires_grad_(False)
        self.dino_out_dim = cfg.dino.head_n_prototypes
        self.ibot_out_dim = cfg.ibot.head_n_prototypes if self.ibot_separate_head else self.dino_out_dim
        self.dino_loss = DINOLoss(self.dino_out_dim)
        self.ibot_patch_loss = iBOTPatchLoss(self.ibot_out_dim)
        self.num_prototypes = self.dino_out_dim if self.do_dino else self.ibot_out_dim
        self.koleo_loss = KoLeoLoss(over_all_ranks=cfg.dino.koleo_neighbours == "all")
        self.patch_head = "ibot_head" if self.ibot_separate_head else "dino_head"
        self.recompute, self.pieces = "none", EAGER
        self.lean = cfg.train.lean
        self.shortcuts = fast_paths.find_shortcuts(self)
        self._warned: set[str] = set()
        self.fp16_scaler: torch.amp.GradScaler | None = None
        self.constant_shapes = False  # if True, each batch is padded, see ``pad_patches``
        self.averages_gradients = False  # if True, average over processes, for a loop without ``parallelize``
        self._reducer: GradientReducer | None = None  # averages them
        self.need_to_synchronize_fsdp_streams = False  # upstream's name; this implementation uses no extra streams
        self.diagnose = False
        self.diagnostics: dict[str, Tensor] = {}

    @property
    def device(self) -> torch.device:
        return self.student["backbone"].cls_token.device

    def prepare_for_distributed_training(self, *, load_weights: bool = True) -> None:
        """Fix precision and checkpointing for the device the parameters are on; call once, after moving the model.

        From then on :meth:`forward_backward` averages gradients over all processes, unless ``parallelize`` takes this
        over.

        Args:
            load_weights: start from ``student.pretrained_weights``, if any.
        """
        if load_weights and self.cfg.student.pretrained_weights:
            start_from_weights(self.cfg, self)
        self.averages_gradients = distributed.get_global_size() > 1
        dtype = self.precision("student", "backbone")
        use_scaler = self.cfg.compute_precision.grad_scaler and dtype == torch.float16
        self.fp16_scaler = distributed.make_grad_scaler(self.device.type) if use_scaler else None
        self.set_checkpointing(self._choose_checkpointing())
        compiled = fast_paths.should_compile(self.cfg.train.compile) and fast_paths.compile_step(self)
        self.constant_shapes = compiled or self.device.type == "cuda"

    def _choose_checkpointing(self) -> str:
        wanted = self.cfg.train.activation_checkpointing
        if wanted != "auto" or self.device.type != "cuda":
            return "none" if wanted == "auto" else wanted
        return least_checkpointing(SSLMetaArch, self.cfg, available=memory_for_steps(self))

    def set_checkpointing(self, mode: str) -> None:
        """Let the student's blocks recompute ``none``, ``selective`` or ``full`` in the backward pass."""
        self.recompute = mode

    def update_shortcuts(self) -> None:
        """Find what can be computed from weights in this step, and warn once about anything that prevents it."""
        self.shortcuts = fast_paths.find_shortcuts(self)
        if self.shortcuts.changes:
            fast_paths.leave_out_changed(self)
            warning = self.shortcuts.describe()
            if self.lean and warning not in self._warned:
                logger.warning(warning)
                self._warned.add(warning)

    @property
    def lean_heads(self) -> bool:
        """Return whether heads and their losses are computed a chunk of logits at a time."""
        weights = [self.dino_loss_weight] * self.do_dino + [self.ibot_loss_weight] * self.do_ibot
        return self.lean and self.shortcuts.heads and all(weights)  # the reported terms are divided by the weights

    def _packed(self, side: str) -> Packed:
        blocks = getattr(self.shortcuts, side) if self.lean else frozenset()
        return Packed(blocks, self.recompute if side == "student" else "none", self.pieces)

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

        The student's views are processed (forward and backward) group by group (``train.view_groups``); the grouping
        affects losses and gradients by rounding only.

        Args:
            images: the dict returned by ``collate_data_and_cast``.
            teacher_temp: temperature of the teacher's softmax or Sinkhorn-Knopp.
            generator: CPU generator for the drop-path subsets (None: torch's global one).
            micro_batch: (index, count) when ``count`` batches make one step: gradients are divided by ``count``, and
                the centres are updated once per step.
            on_last_backward: called right before the last backward pass of this call.

        Returns:
            0-dim losses on the device, detached. KoLeo and iBOT are half of the trained terms, as upstream reports
            them.
        """
        images, groups, masked_in_first = self._prepare(images, generator)
        if on_last_backward is None and self.averages_gradients:
            self._reducer = self._reducer or GradientReducer(self.student.named_parameters())
            on_last_backward = self._reducer.arm
        index, count = micro_batch
        self.dino_loss.hold_center = self.ibot_patch_loss.hold_center = index > 0
        targets = self.get_teacher_output(images, teacher_temp)
        reported: dict[str, Tensor] = {}
        # for a cut tensor, drop path keeps a different number of sequences in each branch and step
        shapes_vary = len(groups) > 2 and any(draw is not None for _, draws in groups for draw in draws)
        with without_plans() if shapes_vary else nullcontext():
            for group, draws in groups:
                views = cut_views(images, group, masked_in_first)
                features = self.get_student_output(views, draws)
                total, terms = self.compute_losses(features, targets, group, views)
                if group is groups[-1][0] and on_last_backward is not None:
                    on_last_backward()
                self.backprop_loss(total / count)
                del features, total  # free before the next group's are allocated
                for name, value in terms.items():
                    reported[name] = reported[name] + value.detach() if name in reported else value.detach()
        if self.averages_gradients:
            self._reducer.finish()
        return {name: reported[name] for name in LOSS_NAMES if name in reported}

    @torch.no_grad()
    def evaluate(self, images: dict, teacher_temp: float) -> tuple[dict[str, Tensor], Tensor]:
        """Return a batch's losses, and the teacher's class tokens (2b, D) of the global crops, and change no state.

        The student is in evaluation mode meanwhile, without drop path, and the centres stay as they are. All processes
        must call it.
        """
        modes, diagnose = {module: module.training for module in self.modules()}, self.diagnose
        self.eval()
        self.diagnose = False
        images, groups, masked_in_first = self._prepare(images, None)  # nothing is drawn in evaluation mode
        reported: dict[str, Tensor] = {}
        with self.dino_loss.kept_center(), self.ibot_patch_loss.kept_center():
            cls, patches = self.get_teacher_features(images)
            targets = self._targets(cls, patches, images, teacher_temp)
            for group, draws in groups:
                views = cut_views(images, group, masked_in_first)
                _, terms = self.compute_losses(self.get_student_output(views, draws), targets, group, views)
                for name, value in terms.items():
                    reported[name] = reported[name] + value if name in reported else value
        for module, mode in modes.items():
            module.training = mode
            if hasattr(module, "reshard"):  # FSDP2's, which keeps weights gathered for a backward pass
                module.reshard()
        self.diagnose = diagnose
        return reported, cls

    def _prepare(
        self, images: dict, generator: torch.Generator | None
    ) -> tuple[dict, list[tuple[ViewGroup, list[Draw]]], int]:
        """Return a batch on the device, :meth:`plan_groups` and :meth:`masked_in_first`."""
        self.update_shortcuts()
        groups = self.plan_groups(images, generator)
        masked_in_first = self.masked_in_first(images)
        if self.constant_shapes:
            apart = any(len(group.global_views) == 1 for group, _ in groups)
            images, masked_in_first = pad_patches(images, masked_in_first, apart)
        images = {name: to_device(v, self.device) if isinstance(v, Tensor) else v for name, v in images.items()}
        images |= {name: images[name].float() for name in images if name.endswith("_crops")}  # upstream's are float16
        return images, groups, masked_in_first

    def masked_in_first(self, images: dict) -> int:
        """Return the number of masked patches of the first global crops (waits for the device if they are on it)."""
        return int(images["collated_masks"].chunk(2)[0].sum())

    def plan_groups(self, images: dict, generator: torch.Generator | None) -> list[tuple[ViewGroup, list[Draw]]]:
        """Return the groups, each with its part of the drop-path draws over all global and all local crops."""
        backbone, batch_size = self.student["backbone"], len(images["collated_global_crops"]) // 2
        crops = [images["collated_global_crops"], *([images["collated_local_crops"]] if self.num_local_crops else [])]
        tokens = [batch_size * backbone.num_tokens_of(crop) for crop in crops]
        groups = group_views(
            self.cfg.train.view_groups,
            self.num_local_crops if self.do_dino else 0,  # otherwise the local crops are unused
            tokens[0],
            tokens[-1],
            backbone.embed_dim * backbone.n_blocks,
            self.device.type,
        )
        draws = backbone.draw([len(crop) for crop in crops], generator)
        return [(group, cut_draws(draws, group, batch_size)) for group in groups]

    @torch.no_grad()
    def get_teacher_output(self, images: dict, teacher_temp: float) -> Targets:
        """Compute target probabilities from the unmasked global crops."""
        if not (self.do_dino or self.do_ibot):
            return Targets(None, None)
        cls, patches = self.get_teacher_features(images)
        targets = self._targets(cls, patches, images, teacher_temp)
        if self.diagnose:
            rows = cls.chunk(2)[0][:MAX_RANKME_ROWS].float()
            self.diagnostics = assignment_entropies(targets) | {"rankme": rows}
        return targets

    @torch.no_grad()
    def get_teacher_features(self, images: dict) -> tuple[Tensor, Tensor | None]:
        """Return the teacher's class tokens (2b, D) of the unmasked global crops, and its features of the masked
        patches (M, D), None without iBOT."""
        with self.autocast("teacher", "backbone"):
            crops, packed = images["collated_global_crops"], self._packed("teacher")
            options = {"packed": packed} if fast_paths.takes_options(self.teacher["backbone"]) else {}
            features = self.teacher["backbone"](crops, is_training=True, **options)
        return features["x_norm_clstoken"], self._masked_patches(features, images["mask_indices_list"])

    def _targets(self, cls: Tensor, patches: Tensor | None, images: dict, teacher_temp: float) -> Targets:
        first, second = cls.chunk(2)
        swapped = torch.cat((second, first)) if self.do_dino else None  # each crop's target is the other crop
        return self.assign(swapped, patches, images, teacher_temp)

    def assign(self, cls: Tensor | None, patches: Tensor | None, images: dict, teacher_temp: float) -> Targets:
        """Compute targets from the teacher's class tokens and masked patches by the configured centering."""
        rows = {"real_rows": (images["masks_weight"] > 0).float()} if self.constant_shapes else {}
        if self.lean_heads:
            return self._assign_lazily(cls, patches, teacher_temp, rows)
        cls_logits, patch_logits = self.run_heads("teacher", [] if cls is None else [cls], patches)
        of_cls = None if cls is None else self._assign_logits(self.dino_loss, cls_logits[0], teacher_temp)
        if patch_logits is None:
            return Targets(of_cls, None)
        if self.cfg.train.centering == "sinkhorn_knopp":
            rows["n_masked_patches_tensor"] = images["n_masked_patches"]
        return Targets(of_cls, self._assign_logits(self.ibot_patch_loss, patch_logits, teacher_temp, **rows))

    def _assign_logits(self, loss: nn.Module, logits: Tensor, teacher_temp: float, **rows: Tensor) -> Tensor:
        """Compute targets from all logits; ``rows``: keyword arguments about rows of patches."""
        if self.cfg.train.centering == "sinkhorn_knopp":
            return loss.sinkhorn_knopp_teacher(logits, teacher_temp, **rows)
        targets = loss.softmax_center_teacher(logits, teacher_temp=teacher_temp)
        loss.update_center(logits, **rows)
        targets = targets.view_as(logits)  # the centre of patches has an extra dimension
        return targets * rows["real_rows"][:, None] if rows else targets

    def _assign_lazily(
        self, cls: Tensor | None, patches: Tensor | None, teacher_temp: float, rows: dict[str, Tensor]
    ) -> Targets:
        """Return targets whose rows are computed on demand, so that the full logits are never materialised."""

        def assign(loss: nn.Module, factors: tuple[Tensor, Tensor] | None, keep: bool, **rows: Tensor):
            if factors is None:
                return None
            if self.cfg.train.centering == "sinkhorn_knopp":
                logits = TeacherLogits.of_factors(*factors, keep=True)
                return sinkhorn_targets(logits, teacher_temp, over_all_ranks=loss.over_all_ranks, **rows)
            return loss.lazy_targets(*factors, teacher_temp, keep=keep, **rows)

        of_cls, of_patches = self._logit_factors(cls, patches)
        return Targets(  # a class token's targets are used by several groups of views, a patch's by one
            assign(self.dino_loss, of_cls, keep=True), assign(self.ibot_patch_loss, of_patches, keep=False, **rows)
        )

    def _logit_factors(self, cls: Tensor | None, patches: Tensor | None) -> list[tuple[Tensor, Tensor] | None]:
        """Return the teacher's bottleneck features and prototypes for class tokens and for patches (None if there are
        none), in one pass if they share the head."""
        shared = cls is not None and patches is not None and not self.ibot_separate_head
        parts = [("dino_head", cls), (self.patch_head, patches)]
        if shared:
            parts = [("dino_head", torch.cat((cls, patches)))]
        factors: list[tuple[Tensor, Tensor] | None] = []
        for head, rows in parts:
            with self.autocast("teacher", head):
                factors.append(None if rows is None else self.teacher[head].factors(rows))
        if not shared:
            return factors
        features, weight = factors[0]
        return [(part, weight) for part in features.split((len(cls), len(patches)))]

    def get_student_output(self, views: Views, draws: list[Draw]) -> Features:
        """Run a group's masked global crops and local crops through the student in one pass."""
        crops = [(views.global_crops, views.masks), (views.local_crops, None)]
        crops, masks = zip(*((crop, mask) for crop, mask in crops if crop is not None), strict=True)
        with self.autocast("student", "backbone"):
            options = {"draws": draws, "packed": self._packed("student")}
            options = options if fast_paths.takes_options(self.student["backbone"]) else {}
            features = self.student["backbone"](list(crops), masks=list(masks), is_training=True, **options)
        local, of_global = views.local_crops is not None, views.global_crops is not None
        return Features(
            local_cls=features[-1]["x_norm_clstoken"] if local else None,
            global_cls=features[0]["x_norm_clstoken"] if of_global else None,
            patches=self._masked_patches(features[0], views.patches) if of_global else None,
        )

    def compute_losses(self, features: Features, targets: Targets, group: ViewGroup, views: Views) -> Terms:
        """Return a group's part of the loss to train on, and the same part of the terms as upstream reports them."""
        head_terms = self._chunked_terms if self.lean_heads else self._dense_terms
        total, reported = head_terms(features, targets, group, views)
        if self.do_koleo and features.global_cls is not None:
            halves = features.global_cls.chunk(len(group.global_views))
            koleo = self.cfg.dino.koleo_loss_weight * sum(self.koleo_loss(half) for half in halves)
            reported["koleo_loss"] = koleo / 2
            total = total + koleo
        return total, reported

    def _dense_terms(self, features: Features, targets: Targets, group: ViewGroup, views: Views) -> Terms:
        """Return a group's part of the DINO and iBOT terms from all its logits.

        Source: upstream ``train/ssl_meta_arch.py``; the DINO terms are averaged over 2 + max(2 L, 1) crop pairs.
        """
        total, reported = torch.zeros((), device=self.device), {}
        pairs, share = num_crop_pairs(self.num_local_crops), len(group.global_views) / 2
        cls = [one for one in (features.local_cls, features.global_cls) if one is not None]
        cls_logits, patch_logits = self.run_heads("student", cls if self.do_dino else [], features.patches)
        if self.do_dino and features.local_cls is not None:
            local = self.dino_loss(cls_logits[0].chunk(len(group.local_views)), targets.cls.chunk(2)) / pairs
            reported["dino_local_crops_loss"] = local
            total = total + self.dino_loss_weight * local
        if self.do_dino and features.global_cls is not None:
            start, stop = (edge * views.batch_size for edge in (group.global_views.start, group.global_views.stop))
            of_global = self.dino_loss([cls_logits[-1]], [targets.cls[start:stop]]) * 2 * share / pairs
            reported["dino_global_crops_loss"] = of_global
            total = total + self.dino_loss_weight * of_global
        if patch_logits is not None:
            ibot = share * self.ibot_patch_loss.forward_masked(
                patch_logits,
                targets.patches[views.patch_rows.start : views.patch_rows.stop],
                student_masks_flat=views.masks,
                masks_weight=views.patch_weights,
            )
            reported["ibot_loss"] = ibot / 2
            total = total + self.ibot_loss_weight * ibot
        return total, reported

    def _chunked_terms(self, features: Features, targets: Targets, group: ViewGroup, views: Views) -> Terms:
        """Return what :meth:`_dense_terms` does, a chunk of logits at a time."""
        work = {"dino_head": _HeadWork([], [], []), "ibot_head": _HeadWork([], [], [])}
        if self.do_dino:
            self._add_class_tokens(work["dino_head"], features, targets.cls, group, views.batch_size)
        if features.patches is not None:
            self._add_patches(work[self.patch_head], features.patches, targets.patches, views)
        total, reported = torch.zeros((), device=self.device), {}
        for name, (parts, jobs, names) in work.items():
            if jobs:
                with self.autocast("student", name):
                    loss, losses = self.student[name].cross_entropy(torch.cat(parts), jobs)
                total = total + loss
                reported |= {term: value * factor for (term, factor), value in zip(names, losses, strict=True)}
        return total, reported

    def _add_class_tokens(
        self, work: _HeadWork, features: Features, targets: SoftTargets, group: ViewGroup, batch_size: int
    ) -> None:
        weight = self.dino_loss_weight
        each = weight / (batch_size * num_crop_pairs(self.num_local_crops))
        if features.local_cls is not None:

            def of_both_crops(start: int, stop: int) -> Tensor:
                return targets.rows(start, stop).add_(targets.rows(batch_size + start, batch_size + stop))

            weights = torch.full((batch_size,), each, device=self.device)
            options = {"num_views": len(group.local_views), "mass": 2.0, "temperature": self.dino_loss.student_temp}
            work.features.append(features.local_cls)
            work.jobs.append(PrototypeJob(of_both_crops, batch_size, weights, **options))
            work.names.append(("dino_local_crops_loss", 1 / weight))
        if features.global_cls is not None:
            rows, first = len(features.global_cls), group.global_views.start * batch_size
            weights = torch.full((rows,), each, device=self.device)
            temperature = self.dino_loss.student_temp
            work.features.append(features.global_cls)
            work.jobs.append(PrototypeJob(_rows_from(targets, first), rows, weights, temperature=temperature))
            work.names.append(("dino_global_crops_loss", 1 / weight))

    def _add_patches(self, work: _HeadWork, patches: Tensor, targets: SoftTargets, views: Views) -> None:
        weight, temperature = self.ibot_loss_weight, self.ibot_patch_loss.student_temp
        weights = views.patch_weights.float() * (weight / (2 * views.batch_size))
        rows = _rows_from(targets, views.patch_rows.start)
        work.features.append(patches)
        work.jobs.append(PrototypeJob(rows, len(patches), weights, temperature=temperature))
        work.names.append(("ibot_loss", 1 / (2 * weight)))

    def backprop_loss(self, loss: Tensor) -> None:
        if self.fp16_scaler is not None:
            loss = self.fp16_scaler.scale(loss)
        loss.backward()

    @torch.no_grad()
    def update_teacher(self, m: float, skip: Tensor | None = None) -> None:
        """Update the teacher in place: t <- m t + (1 - m) s, over all parameters.

        If the 0-dim ``skip`` is 1, it is unchanged.
        """
        teacher, student = ([own_share(p) for p in side.parameters()] for side in (self.teacher, self.student))
        if [p.shape for p in teacher] != [p.shape for p in student]:
            raise DINOv2Error(
                f"update_teacher: expected the teacher to have the student's {len(student)} parameters, got "
                f"{len(teacher)}; what is put into model.student (LoRA, adapters) has to be put into model.teacher, too"
            )
        # SGD with decay 1 and the negated student as gradient: t <- t - (1 - m) (t - s). Of torch's multi-tensor
        # kernels, only those of fused optimizers take the flag; lerp with a weight on the device runs once per tensor.
        torch._fused_sgd_(
            *(teacher, student, []),
            lr=1.0 - m,
            weight_decay=1.0,
            maximize=True,
            momentum=0.0,
            dampening=0.0,
            nesterov=False,
            is_first_step=False,
            found_inf=skip,
        )

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
        """Do nothing: FSDP uses no streams here that would need synchronisation. Upstream's name."""

    def precision(self, model: str, part: str) -> torch.dtype:
        """Return the dtype in which ``part`` of ``model`` computes."""
        precision = self.cfg.compute_precision[model][part].mixed_precision
        return resolve_dtype(precision.param_dtype, self.device)

    def autocast(self, model: str, part: str) -> AbstractContextManager:
        """Return a context manager in which ``part`` of ``model`` computes in its configured precision."""
        dtype = self.precision(model, part)
        return torch.autocast(self.device.type, dtype=dtype, enabled=dtype != torch.float32)

    def _masked_patches(self, features: dict, positions: Tensor) -> Tensor | None:
        return features["x_norm_patchtokens"].flatten(0, 1).index_select(0, positions) if self.do_ibot else None

    def run_heads(
        self, model: str, cls_list: list[Tensor], patches: Tensor | None
    ) -> tuple[list[Tensor], Tensor | None]:
        """Return the logits of class tokens and masked patches; in one pass if they share the head."""
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


def _rows_from(targets: SoftTargets, first: int) -> Callable[[int, int], Tensor]:
    return lambda start, stop: targets.rows(first + start, first + stop)


def assignment_entropies(targets: Targets) -> dict[str, Tensor]:
    """Return two entropies of the teacher's assignments, in nats: ``teacher_entropy``, the mean entropy of a row, and
    ``prototype_entropy``, the entropy of the mean row. Both at ln K mean uniform collapse; the second near 0 means that
    one prototype takes all images."""
    assignments = targets.cls if targets.cls is not None else targets.patches
    chunks = [assignments] if isinstance(assignments, Tensor) else assignments.chunks()
    of_rows, mean = torch.zeros(()), torch.zeros(())
    for probabilities in chunks:
        of_rows = of_rows - torch.xlogy(probabilities, probabilities).sum()
        mean = mean + probabilities.sum(dim=0)
    num_rows = mean.sum().round().clamp_min(1)  # each row sums to 1, padding to 0
    mean = mean / num_rows
    # not torch.special.entr, which is compiled on its first use on a GPU
    return {"teacher_entropy": of_rows / num_rows, "prototype_entropy": -torch.xlogy(mean, mean).sum()}
