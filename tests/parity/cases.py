"""The configurations in which our training step is compared with upstream's, as a table.

Widths are the real ones. Images, prototypes and some depths are reduced to what one core does in seconds; none of them
enters a formula. The clipping norms of :data:`RUN_CASES` are such that some steps are clipped and others are not.
:data:`STEP_CASES` is for losses and gradients, :data:`RUN_CASES` for twenty optimizer steps; both with one setting of
what makes our step fast, :data:`MEANS_CASES` and :data:`MEANS_RUN_CASES` (ten steps), smaller, with all of them.
"""

from __future__ import annotations

from dataclasses import dataclass

P14 = "student.patch_size=14 crops.global_crops_size=112 crops.local_crops_size=42"
P16 = "student.patch_size=16 crops.global_crops_size=112 crops.local_crops_size=48"
NATIVE = "student.patch_size=14 crops.global_crops_size=224 crops.local_crops_size=98 dino.head_n_prototypes=65536"
DROP_0 = "student.drop_path_rate=0"
DROP_4 = "student.drop_path_rate=0.4"
SEPARATE = "ibot.separate_head=true"
SINKHORN = "train.centering=sinkhorn_knopp"
SWIGLU = "student.ffn_layer=swiglufused"
VITL14 = f"{P14} {SEPARATE} {SINKHORN} {SWIGLU} {DROP_4} dino.head_bottleneck_dim=384 student.block_chunks=2"
WEIGHTS = "dino.loss_weight=0.7 ibot.loss_weight=1.3 dino.koleo_loss_weight=0.3"
NO_BIAS = "student.qkv_bias=false student.proj_bias=false student.ffn_bias=false student.layerscale=0"
COMMON = "crops.local_crops_number=4 dino.head_n_prototypes=4096 ibot.head_n_prototypes=3072"
SHORT_RUN = (
    "crops.global_crops_size=84 crops.local_crops_size=28 "
    "train.OFFICIAL_EPOCH_LENGTH=4 optim.epochs=6 optim.warmup_epochs=1 optim.freeze_last_layer_epochs=1 "
    "teacher.warmup_teacher_temp_epochs=3 dino.head_hidden_dim=512 ibot.head_hidden_dim=512"
)


SMALL = (
    "student.patch_size=14 crops.global_crops_size=84 crops.local_crops_size=28 "
    "dino.head_n_prototypes=512 ibot.head_n_prototypes=384 dino.head_hidden_dim=128 ibot.head_hidden_dim=128 "
    "dino.head_bottleneck_dim=64 ibot.head_bottleneck_dim=64"
)


@dataclass(frozen=True)
class Case:
    """One configuration: architecture, ``key=value`` overrides, number of blocks (None: all) and images.

    ``as_initialised`` keeps upstream's initial weights. Their LayerScale of 1e-5 hides most of a block, and the class
    tokens are so similar that KoLeo's gradient is rounding noise, so by default noise is added to every weight.
    """

    name: str
    arch: str
    overrides: str
    depth: int | None = None
    batch_size: int = 3
    as_initialised: bool = False

    def dotlist(self) -> list[str]:
        """Return all overrides, in a form that both configurations accept."""
        own = f"student.arch={self.arch} train.batch_size_per_gpu={self.batch_size}"
        return f"{own} {COMMON} {self.overrides}".split()


STEP_CASES = [
    Case("S/14", "vit_small", f"{P14} {DROP_0}"),
    Case("S/14 initial weights, no KoLeo", "vit_small", f"{P14} dino.koleo_loss_weight=0", 6, as_initialised=True),
    Case("S/14 crops 224+98, 65536 prototypes", "vit_small", f"{NATIVE} {DROP_0}", 6, 2),
    Case("S/16 drop path", "vit_small", P16, 6, 4),
    Case(
        "S/14 sinkhorn, separate heads, chunks",
        "vit_small",
        f"{P14} {DROP_0} {SINKHORN} {SEPARATE} student.block_chunks=4",
        8,
    ),
    Case(
        "S/14 sinkhorn, shared head, drop path .05", "vit_small", f"{P14} {SINKHORN} student.drop_path_rate=0.05", 6, 4
    ),
    Case("S/14 drop path rising to .4", "vit_small", f"{P14} {DROP_4} student.drop_path_uniform=false", 6, 5),
    Case("S/14 no KoLeo", "vit_small", f"{P14} {DROP_0} dino.koleo_loss_weight=0", 4),
    Case("S/14 no iBOT", "vit_small", f"{P14} {DROP_0} ibot.loss_weight=0", 4),
    Case("S/14 loss weights .7, 1.3, .3", "vit_small", f"{P14} {DROP_0} {WEIGHTS}", 4),
    Case(
        "S/14 no biases, no LayerScale, one-layer head", "vit_small", f"{P14} {DROP_0} {NO_BIAS} dino.head_nlayers=1", 4
    ),
    Case("S/14 swiglu, drop path", "vit_small", f"{P14} student.ffn_layer=swiglu", 4, 4),
    Case("B/14", "vit_base", f"{P14} {DROP_0}", 4, 2),
    Case("B/16 drop path, chunks", "vit_base", f"{P16} student.block_chunks=2", 4, 4),
    Case("B/14 swiglu, separate heads, sinkhorn, drop path", "vit_base", VITL14, 4),
    Case("L/16", "vit_large", f"{P16} {DROP_0}", 2),
    Case("L/14 as vitl14.yaml", "vit_large", VITL14, 2),
    Case("g/14", "vit_giant2", f"{P14} {DROP_0}", 2, 2),
    Case("g/14 as vitg14.yaml", "vit_giant2", VITL14, 2),
]

RUN_CASES = [
    Case("S/14 centering, drop path", "vit_small", f"{P14} {SHORT_RUN} optim.clip_grad=0.5", 2),
    Case(
        "S/14 sinkhorn, separate heads, swiglu, drop path, chunks",
        "vit_small",
        f"{VITL14} {SHORT_RUN} optim.clip_grad=0.25",
        4,
    ),
]

MEANS_CASES = [
    Case("centering, shared head, drop path", "vit_small", SMALL, 2, 4),
    Case("sinkhorn, separate heads, swiglu, drop path, chunks", "vit_small", f"{VITL14} {SMALL}", 2, 4),
]
SHORTER_RUN = SHORT_RUN.replace("OFFICIAL_EPOCH_LENGTH=4", "OFFICIAL_EPOCH_LENGTH=2")  # ten steps see every phase
MEANS_RUN_CASES = [
    Case(case.name, case.arch, f"{SHORTER_RUN} {case.overrides} optim.clip_grad=0.5", case.depth, case.batch_size)
    for case in MEANS_CASES
]
ONE_BLOCK = Case("one block, sinkhorn", "vit_small", f"{SMALL} {SINKHORN} {DROP_0}", 1, 4)
