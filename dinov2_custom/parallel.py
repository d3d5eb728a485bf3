"""Data parallelism: shard or replicate the networks' parts, and average gradients over processes.

A part (backbone, head) is either replicated, with its gradients averaged in buckets while the backward pass runs, or
sharded (``sharding.py``). Parameters keep their names.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dinov2_custom import distributed
from dinov2_custom.utils.transfer import HostCopy, to_device, to_host

BUCKET_MIB = 25.0
NO_SHARD, SHARD_GRAD_OP, FULL_SHARD = "NO_SHARD", "SHARD_GRAD_OP", "FULL_SHARD"
# weights, gradients and AdamW's two moments of the student, and the teacher's weights, all float32
BYTES_A_PARAMETER = 20
MOST_OF_A_DEVICE = 0.25


def parallelize(cfg, model: nn.Module) -> GradientReducer:
    """Shard the parts of ``model`` for which ``compute_precision`` requests it; return the reducer of its gradients.

    Call it once, after the initial weights are loaded and before the optimizer is created, as sharding replaces
    parameters. All processes must hold the same weights.
    """
    model.averages_gradients = False  # the returned reducer does
    strategies = choose_strategies(cfg, model)
    for name, strategy in strategies.items():
        if strategy != NO_SHARD:
            from dinov2_custom.sharding import shard_part  # a slow import that most runs do not need

            precision = cfg.compute_precision
            gathered = {"gather_dtype": precision.gather_dtype}
            shard_part(model.student[name], precision.student[name], reshard=strategy == FULL_SHARD, **gathered)
            # freed after the forward pass: there is no backward pass to do so, and they change before the next forward
            shard_part(model.teacher[name], precision.teacher[name], reshard=True, **gathered)
    sharded = {name: model.student[name] for name, strategy in strategies.items() if strategy != NO_SHARD}
    parts = {name: part for name, part in model.student.items() if name not in sharded}
    whole = [(f"{name}.{key}", p) for name, part in parts.items() for key, p in part.named_parameters()]
    # the last backward pass may be over local crops, which do not use the separate patch head
    held = [part for name, part in sharded.items() if strategies[name] == SHARD_GRAD_OP and name != "ibot_head"]
    return GradientReducer(whole, sharded=held, strategies=strategies)


def choose_strategies(cfg, model: nn.Module) -> dict[str, str]:
    """Return part -> strategy. ``auto`` is NO_SHARD if everything fits into a quarter of the smallest device's memory,
    else SHARD_GRAD_OP; a single process, and ``auto`` on CPUs, never shard. All processes must call it.
    """
    # decided over all processes: different choices would give mismatched collectives
    smallest = min(distributed.gather_objects(_device_bytes(model.device)))
    return strategies_on(cfg, model.student, smallest, distributed.get_global_size())


def strategies_on(cfg, student: nn.ModuleDict, smallest: float, world_size: int) -> dict[str, str]:
    """Return part -> strategy for ``world_size`` processes whose smallest device has ``smallest`` bytes."""
    if world_size == 1:
        return dict.fromkeys(student, NO_SHARD)
    num_bytes = BYTES_A_PARAMETER * sum(p.numel() for p in student.parameters())
    auto = SHARD_GRAD_OP if num_bytes > MOST_OF_A_DEVICE * smallest else NO_SHARD
    chosen = {name: cfg.compute_precision.student[name].sharding_strategy for name in student}
    return {name: auto if strategy == "auto" else strategy for name, strategy in chosen.items()}


def bytes_elsewhere(student: nn.ModuleDict, strategies: dict[str, str], world_size: int) -> float:
    """Return the bytes of sharded weights, gradients and AdamW's moments that other processes hold.

    Weights gathered for the computation are not subtracted.
    """
    sharded = (part for name, part in student.items() if strategies[name] != NO_SHARD)
    return BYTES_A_PARAMETER * sum(p.numel() for part in sharded for p in part.parameters()) * (1 - 1 / world_size)


def is_sharded(tensor: Tensor) -> bool:
    """Return whether each process holds only some rows of the tensor (torch's DTensor)."""
    return hasattr(tensor, "to_local")


def whole_tensor(tensor: Tensor) -> Tensor:
    """Gather a sharded tensor; return any other tensor itself. All processes must call it."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def own_share(tensor: Tensor) -> Tensor:
    """Return the rows that this process holds, sharing memory; return a tensor that is not sharded itself."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def first_row(tensor: Tensor) -> int:
    """Return the index of the first row of :func:`own_share`; shards are those of ``torch.chunk``."""
    if not is_sharded(tensor):
        return 0
    rows, parts = tensor.shape[0], tensor.device_mesh.size()
    start = min(tensor.device_mesh.get_local_rank() * -(-rows // parts), rows)
    assert len(tensor.to_local()) == min(-(-rows // parts), rows - start)
    return start


def _device_bytes(device: torch.device) -> float:
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else float("inf")


class _Bucket:
    """Parameters whose gradients are reduced together; ``flat`` holds these, then the number of processes with each."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        self.parameters = parameters
        self.waiting: set[int] = set()
        self.flat: Tensor | None = None
        self.work: dist.Work | None = None

    def launch(self) -> None:
        """Start the sum over all processes; a parameter without gradient contributes zeros."""
        parts = [p.grad.flatten() if p.grad is not None else p.new_zeros(p.numel()) for p in self.parameters]
        has_one = torch.tensor([float(p.grad is not None) for p in self.parameters], dtype=parts[0].dtype)
        self.flat = torch.cat([*parts, to_device(has_one, parts[0].device)])
        self.work = dist.all_reduce(self.flat, async_op=True)

    def finish(self, world_size: int) -> Tensor:
        """Wait, and write back the means where there was a gradient; return the fraction of processes that had one."""
        self.work.wait()
        sizes = [p.numel() for p in self.parameters]
        *means, have_one = self.flat.div_(world_size).split([*sizes, len(sizes)])
        for parameter, mean in zip(self.parameters, means, strict=True):
            if parameter.grad is not None:
                parameter.grad = mean.view_as(parameter)
        self.flat = self.work = None
        return have_one


class GradientReducer:
    """Average gradients over all processes, in buckets, each sent as soon as its last gradient is computed.

    In every step, the same parameters must have a gradient in all processes, possibly zero (for example if a batch has
    no masked patch). This is checked one step later, when it can be read without waiting for the device. FSDP2 reduces
    the
    gradients of sharded parts: those in ``sharded`` only in the last backward pass, which must reach all of them, with
    their weights kept gathered until then; the others in every backward pass. In a single process nothing happens.
    Usage::

        reducer.arm()           # before the last backward pass of a step
        loss.backward()
        reducer.finish()

    Backward passes before :meth:`arm` only accumulate.
    """

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, nn.Parameter]],
        bucket_mib: float = BUCKET_MIB,
        sharded: Sequence[nn.Module] = (),
        strategies: dict[str, str] | None = None,
    ) -> None:
        self.world_size = distributed.get_global_size()
        self.strategies = strategies or {}
        self.sharded = sharded
        self.armed = False
        self._sync_sharded(False)
        self.buckets: list[_Bucket] = []
        self._shares: HostCopy | None = None
        if self.world_size == 1:
            return
        # the gradients of the last layers are ready first
        named = list(named_parameters)[::-1]
        self._names = [name for name, _ in named]
        for run in _grouped([parameter for _, parameter in named], bucket_mib * 2**20):
            self.buckets.append(_Bucket(run))
            for parameter in run:
                parameter.register_post_accumulate_grad_hook(self._hook(self.buckets[-1]))

    def arm(self) -> None:
        """Prepare for the last backward pass of this step."""
        self.armed, self._next = True, 0
        self._sync_sharded(True)
        for bucket in self.buckets:
            bucket.waiting = {id(parameter) for parameter in bucket.parameters}

    def finish(self) -> None:
        """Send the remaining buckets, wait for all of them and write the means to ``.grad``.

        Raises:
            RuntimeError: in the step before, only some processes had a gradient of a parameter.
        """
        self.check()
        self.armed = False
        self._sync_sharded(False)
        for bucket in self.buckets[self._next :]:
            bucket.launch()
        shares = [bucket.finish(self.world_size) for bucket in self.buckets]
        self._shares = to_host(torch.cat(shares)) if shares else None

    def check(self) -> None:
        """Compare the gradients of the last step over the processes; raise as :meth:`finish` does."""
        if self._shares is None:
            return
        unlike = [name for name, share in zip(self._names, self._shares.tolist(), strict=True) if 0 < share < 1]
        if unlike:
            names = ", ".join(unlike)
            raise RuntimeError(f"gradients: expected them in all processes or in none, got them in some, of {names}")

    def describe(self) -> str:
        """Return the strategy of each part for the start-up block."""
        if self.world_size == 1:
            return "parallel: one process"
        parts = " ".join(f"{part}={strategy}" for part, strategy in self.strategies.items())
        return f"parallel: {self.world_size} processes, {parts} (NO_SHARD: data parallel, others: FSDP2)"

    def _sync_sharded(self, sync: bool) -> None:
        for part in self.sharded:
            part.set_requires_gradient_sync(sync)
            part.set_reshard_after_backward(sync)

    def _hook(self, bucket: _Bucket):
        def on_gradient(parameter: nn.Parameter) -> None:
            if self.armed:
                bucket.waiting.discard(id(parameter))
                while self._next < len(self.buckets) and not self.buckets[self._next].waiting:
                    self.buckets[self._next].launch()
                    self._next += 1

        return on_gradient


def _grouped(parameters: list[nn.Parameter], max_bytes: float) -> Iterable[list[nn.Parameter]]:
    """Split the list into runs of one dtype and at most ``max_bytes`` (a larger parameter is a run of its own)."""
    run: list[nn.Parameter] = []
    size = 0
    for parameter in parameters:
        num_bytes = parameter.numel() * parameter.element_size()
        if run and (size + num_bytes > max_bytes or parameter.dtype != run[0].dtype):
            yield run
            run, size = [], 0
        run.append(parameter)
        size += num_bytes
    if run:
        yield run
