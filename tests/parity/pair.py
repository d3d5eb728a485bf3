"""Our trainer beside upstream's: the same weights, the same batch, and the differences of the results."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from dinov2_custom.configs.load import load_run_config
from dinov2_custom.models import vision_transformer
from dinov2_custom.train import fast_paths
from dinov2_custom.train import train as our_train
from dinov2_custom.train.ssl_meta_arch import SSLMetaArch
from tests.oracle import OracleTrainer, make_batch, preserved_rng, reduced_depth
from tests.parity.cases import Case

FP32 = [
    f"compute_precision.{side}.{part}.mixed_precision.{kind}_dtype=fp32"
    for side in ("student", "teacher")
    for part in ("backbone", "dino_head", "ibot_head")
    for kind in ("param", "reduce")
]


@dataclass(frozen=True)
class Means:
    """The optimisations of our step, none of which changes a result.

    Attributes:
        groups, lean, recompute: ``train.view_groups``, ``train.lean``, ``train.activation_checkpointing``.
        padded: whether masked patches are padded to constant shapes.
        compiler: backend of torch.compile, or None.
    """

    groups: int
    lean: bool
    recompute: str = "none"
    padded: bool = False
    compiler: str | None = None

    def keys(self) -> list[str]:
        recompute = f"train.activation_checkpointing={self.recompute}"
        return [f"train.view_groups={self.groups}", f"train.lean={str(self.lean).lower()}", recompute]

    def __str__(self) -> str:
        names = ("lean" if self.lean else "", self.recompute, "padded" if self.padded else "", self.compiler)
        return f"{self.groups} groups " + " ".join(name for name in names if name not in ("", "none", None))


OPTIMISED = Means(groups=4, lean=True)
PLAIN = Means(groups=1, lean=False)


def our_config(overrides: list[str], output_dir: str):
    """Return our configuration for upstream-style overrides, everything in fp32."""
    precision = [*FP32, "compute_precision.grad_scaler=false"]
    return load_run_config(None, [*overrides, *precision], output_dir, require_dataset=False, warn=lambda note: None)


class OurTrainer:
    """Our model and optimizer with the calls of :class:`tests.oracle.trainer.OracleTrainer`."""

    def __init__(self, overrides: list[str], output_dir: str, *, depth: int | None = None, means: Means = OPTIMISED):
        self.cfg = our_config([*overrides, *means.keys()], output_dir)
        with preserved_rng(0), reduced_depth(vision_transformer, depth):
            self.model = SSLMetaArch(self.cfg)
        self.model.prepare_for_distributed_training()
        assert means.compiler is None or fast_paths.compile_step(self.model, means.compiler)
        self.model.constant_shapes = means.padded
        self.model.train()
        self.optimizer = our_train.build_optimizer(self.cfg, self.model.get_params_groups())

    def forward_backward(self, batch: dict, teacher_temp: float, seed: int = 0) -> dict[str, Tensor]:
        images = {key: value.clone() if torch.is_tensor(value) else value for key, value in batch.items()}
        generator = torch.Generator().manual_seed(seed)
        return self.model.forward_backward(images, teacher_temp=teacher_temp, generator=generator)

    def train_step(self, batch: dict, iteration: int, schedules: tuple, seed: int = 0) -> dict[str, Tensor]:
        lr, wd, momentum, teacher_temp, last_layer_lr = (schedule[iteration] for schedule in schedules)
        our_train.apply_optim_scheduler(self.optimizer, lr, wd, last_layer_lr)
        self.optimizer.zero_grad(set_to_none=True)
        losses = self.forward_backward(batch, float(teacher_temp), seed)
        norms = our_train.clip_gradients(self.cfg, self.model, self.optimizer)
        assert all(norm.isfinite() for norm in norms.values()), "non-finite gradients"
        our_train.step_unless(torch.zeros(()), self.model, self.optimizer, momentum)
        return losses


def make_pair(
    oracle: SimpleNamespace, case: Case, output_dir: str, means: Means = OPTIMISED
) -> tuple[OracleTrainer, OurTrainer]:
    """Build both trainers with the same weights, by default not those a network starts from."""
    theirs = OracleTrainer(oracle, case.dotlist(), depth=case.depth)
    ours = OurTrainer(case.dotlist(), output_dir, depth=case.depth, means=means)
    if not case.as_initialised:
        unsettle(theirs.model, seed=1)
    load_into_ours(theirs.model.state_dict(), ours.model)
    return theirs, ours


def load_into_ours(state: dict[str, Tensor], model: SSLMetaArch) -> None:
    """Load upstream's weights strictly; only the centre of a disabled loss may keep its value."""
    missing, unexpected = model.load_state_dict(state, strict=False)
    off = {"ibot_patch_loss.center"} if not model.do_ibot else set()
    assert not unexpected and set(missing) <= off, (missing, unexpected)


@torch.no_grad()
def unsettle(model: nn.Module, seed: int) -> None:
    """Add noise to every weight, separately for student and teacher: an initial 0, 1 or 1e-5 hides mistakes."""
    generator = torch.Generator().manual_seed(seed)
    for name, value in [*model.named_parameters(), *model.named_buffers()]:
        noise = torch.randn(value.shape, generator=generator)
        if name.endswith("gamma"):
            value.copy_(0.3 + 0.1 * noise)
        else:
            value.add_(0.02 * noise)


@dataclass(frozen=True)
class StepErrors:
    """Relative errors of one step against upstream's, by name."""

    losses: dict[str, float]
    gradients: dict[str, float]

    @property
    def worst_loss(self) -> float:
        return max(self.losses.values())

    @property
    def worst_gradient(self) -> float:
        return max(self.gradients.values())


def compare_step(oracle: SimpleNamespace, case: Case, output_dir: str, means: Means = OPTIMISED) -> StepErrors:
    """Run one forward and backward on both sides and return the errors."""
    theirs, ours = make_pair(oracle, case, output_dir, means)
    batch = make_batch(oracle, theirs.cfg, case.batch_size, seed=2)
    expected = theirs.forward_backward(batch, teacher_temp=0.05, seed=3)
    got = ours.forward_backward(batch, teacher_temp=0.05, seed=3)
    return StepErrors(loss_errors(expected, got), gradient_errors(theirs.model.student, ours.model.student))


def loss_errors(expected: dict[str, Tensor], got: dict[str, Tensor]) -> dict[str, float]:
    """|got - expected| / |expected| for each loss; both sides must have the same names."""
    assert set(got) == set(expected), f"losses: expected {sorted(expected)}, got {sorted(got)}"
    return {name: abs(float(got[name]) / float(expected[name]) - 1.0) for name in expected}


def gradient_errors(expected: nn.ModuleDict, got: nn.ModuleDict) -> dict[str, float]:
    """||got - expected|| / ||expected|| for each parameter; none may be without a gradient."""
    errors = {}
    for part in expected:
        references = dict(expected[part].named_parameters())
        for name, param in got[part].named_parameters():
            reference = references.pop(name).grad
            errors[f"{part}.{name}"] = float((param.grad - reference).norm() / reference.norm())
        assert not references, f"{part}: parameters without a counterpart: {sorted(references)}"
    return errors


@dataclass(frozen=True)
class RunErrors:
    """Differences of student and teacher weights after some steps, and their changes.

    Attributes:
        weights: tensor -> largest absolute difference of an element.
        relative: tensor -> norm of the difference over the norm of the tensor.
        moved: tensor -> largest absolute change of an element since the start.
        losses: loss -> largest relative error over the steps.
    """

    weights: dict[str, float]
    relative: dict[str, float]
    moved: dict[str, float]
    losses: dict[str, float]


def compare_run(
    oracle: SimpleNamespace, case: Case, output_dir: str, steps: int, means: Means = OPTIMISED
) -> RunErrors:
    """Train both sides for ``steps`` iterations, a new batch each, with schedules, clipping, AdamW and EMA."""
    theirs, ours = make_pair(oracle, case, output_dir, means)
    start = {name: value.clone() for name, value in theirs.model.state_dict().items()}
    their_schedules = oracle.train.build_schedulers(theirs.cfg)
    our_schedules = our_train.build_schedulers(ours.cfg)
    losses: dict[str, float] = {}
    for iteration in range(steps):
        batch = make_batch(oracle, theirs.cfg, case.batch_size, seed=100 + iteration)
        expected = theirs.train_step(batch, iteration, their_schedules, seed=iteration)
        errors = loss_errors(expected, ours.train_step(batch, iteration, our_schedules, seed=iteration))
        losses = {name: max(error, losses.get(name, 0.0)) for name, error in errors.items()}
    reference = theirs.model.state_dict()
    result = {name: ours.model.state_dict()[name] for name in reference}
    return RunErrors(
        weights={n: float((result[n] - w).abs().max()) for n, w in reference.items()},
        relative={n: float((result[n] - w).norm() / w.norm().clamp_min(1e-12)) for n, w in reference.items()},
        moved={n: float((start[n] - w).abs().max()) for n, w in reference.items()},
        losses=losses,
    )
