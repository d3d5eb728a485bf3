"""The networks and the optimizer as named tensors of a checkpoint, whole or sharded.

Tensors have the names of ``model.state_dict()``; optimizer state of a parameter is named
``optimizer.<key>.<parameter>``. Each process saves and loads only the rows that it holds, so a checkpoint may be loaded
by a different number of processes.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from dinov2_custom import distributed
from dinov2_custom.errors import CheckpointError
from dinov2_custom.parallel import first_row, is_sharded, own_share
from dinov2_custom.utils.checkpoint_folder import Piece, StoredState


def own_pieces(model: nn.Module, optimizer: torch.optim.Optimizer, *, copy: bool = False) -> dict[str, Piece]:
    """Return what this process writes: its rows of sharded tensors and, in the main process, all other tensors.

    Args:
        copy: copy to host memory, so that training can continue while the tensors are written.
    """
    tensors = dict(model.state_dict())
    for name, parameter in _trained(model).items():
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"optimizer.{key}.{name}"] = value
    pieces = {}
    for name, tensor in tensors.items():
        share = own_share(tensor).detach()
        if is_sharded(tensor):
            if len(share):
                pieces[name] = Piece(share, first_row(tensor), tuple(tensor.shape))
        elif distributed.is_main_process():
            pieces[name] = Piece.whole(share)
    if copy:
        pieces = {name: p._replace(tensor=p.tensor.to("cpu", copy=True)) for name, p in pieces.items()}
    return pieces


@torch.no_grad()
def restore(model: nn.Module, optimizer: torch.optim.Optimizer, source: StoredState, path: Path) -> None:
    """Copy this process's rows of every tensor from ``source``, which was read from ``path``, in place.

    Raises:
        CheckpointError: the checkpoint is of another architecture (nothing is changed), or it cannot be read.
    """
    own = model.state_dict()
    stored = {name: shape for name, shape in source.shapes.items() if not name.startswith("optimizer.")}
    check_same_architecture({name: tuple(tensor.shape) for name, tensor in own.items()}, stored, path)
    for name, tensor in own.items():
        _copy_rows(tensor, source, name)
    trained = _trained(model)
    optimizer.state.clear()
    for name in source.shapes:
        if name.startswith("optimizer."):
            _, key, parameter_name = name.split(".", 2)
            if (parameter := trained.get(parameter_name)) is not None:
                optimizer.state[parameter][key] = _state_like(parameter, source, name)


def check_same_architecture(own: dict[str, tuple], got: dict[str, tuple], path: Path) -> None:
    """Compare names and shapes.

    Raises:
        CheckpointError: names or shapes differ; names the first differences and both shapes.
    """
    differences = [
        f"{name}: expected {own.get(name, 'nothing')}, got {got.get(name, 'nothing')}"
        for name in [*own, *(n for n in got if n not in own)]
        if own.get(name) != got.get(name)
    ]
    if differences:
        shown = "\n  ".join(differences[:5])
        raise CheckpointError(
            f"resume: the checkpoint is of another architecture, {len(differences)} of {len(own)} tensors differ "
            f"in {path}:\n  {shown}\nuse the run's own config.yaml, another --output-dir, or --no-resume"
        )


def _trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {f"student.{name}": parameter for name, parameter in model.student.named_parameters()}


def _copy_rows(tensor: Tensor, source: StoredState, name: str) -> None:
    share, start = own_share(tensor), first_row(tensor)
    stop = start + len(share) if share.ndim else 0
    share.copy_(source.rows(name, start, stop))


def _state_like(parameter: nn.Parameter, source: StoredState, name: str) -> Tensor:
    """Return the optimizer's tensor ``name``: sharded as its parameter is, or replicated if it is a step count."""
    shape = source.shapes[name]
    if not shape:
        return source.rows(name, 0, 0).to(parameter.device, copy=True)  # fused kernels expect step counts there
    if shape != tuple(parameter.shape):
        raise CheckpointError(f"resume: expected {name} of shape {tuple(parameter.shape)}, got {shape}")
    state = torch.zeros_like(parameter, memory_format=torch.preserve_format)
    _copy_rows(state, source, name)
    return state
