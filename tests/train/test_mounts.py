"""Checkpoints on file systems without flushing or atomic renames, and power cuts at every step of a save."""

import torch
from omegaconf import OmegaConf
from pytest import mark, raises
from torch import nn

from dinov2_custom.loss import DINOLoss, iBOTPatchLoss
from dinov2_custom.train.checkpoint import Checkpointer
from tests.train.faulty_mount import KINDS, Mount, PowerCutError, names


class Small(nn.Module):
    """The minimal model that a checkpoint needs: few tensors, so few steps."""

    def __init__(self) -> None:
        super().__init__()
        self.cfg = OmegaConf.create({"train": {"seed": 0}})
        self.student, self.teacher = (nn.ModuleDict({"backbone": nn.LayerNorm(3)}) for _ in range(2))
        self.dino_loss, self.ibot_patch_loss = DINOLoss(2), iBOTPatchLoss(2)


class Run:
    """A run directory; saving iteration i makes one weight equal to i."""

    def __init__(self, folder, **keep) -> None:
        self.folder, self.model = folder, Small()
        optimizer = torch.optim.AdamW(self.model.student.parameters())
        self.saver = Checkpointer(folder, self.model, optimizer, **keep)

    def save(self, iteration, final=False):
        with torch.no_grad():
            self.model.student["backbone"].weight.fill_(float(iteration))
        return self.saver.save(iteration, final=final)

    def load(self):
        found = Run(self.folder)
        resumed = found.saver.load_latest()
        assert (found.model.student["backbone"].weight == float(resumed.iteration)).all()
        return resumed.iteration


@mark.parametrize("kind", KINDS)
def test_every_kind_of_mount_keeps_checkpoints_and_no_litter(tmp_path, monkeypatch, kind):
    run = Run(tmp_path, keep_last=2)
    with monkeypatch.context() as patch:
        Mount(patch, kind)
        for iteration in (1, 2, 3):
            run.save(iteration)
        first = run.save(4, final=True)
        second = run.save(5, final=True)
    assert first == second == tmp_path / "model_final"
    assert names(tmp_path) == ["last_checkpoint", "model_0000003", "model_final"]
    assert run.load() == 5 and (tmp_path / "last_checkpoint").read_text() == "model_final"


@mark.parametrize("final", [False, True], ids=["periodic", "final"])
@mark.parametrize("kind", KINDS)
def test_power_cut_at_every_step_of_a_save(tmp_path, monkeypatch, kind, final):
    """The run resumes from the new checkpoint or the previous one, and its next save leaves no partial files."""
    seen, step = set(), 1
    while True:
        folder = tmp_path / str(step)
        run = Run(folder, keep_last=1)
        run.save(1)
        if final:
            run.save(2, final=True)
        before = 2 if final else 1
        with monkeypatch.context() as patch:
            mount = Mount(patch, kind, cut_at=step)
            try:
                run.save(3, final=final)
                cut = False
            except PowerCutError:
                cut = True
        found = run.load()
        assert found in (before, 3) and (cut or found == 3), step
        seen.add(found)
        again = Run(folder, keep_last=1)
        again.save(4)
        left = [name for name in names(folder) if name.endswith(".tmp")]
        assert again.load() == 4 and not left, (step, left)
        if not cut:
            break
        step += 1
    assert seen == {before, 3} and mount.count > 10


def test_a_power_cut_needs_the_marker(tmp_path, monkeypatch):
    """Without checksums, a torn file in a complete-looking folder would be accepted: the test above can fail."""
    run = Run(tmp_path)
    run.save(1)
    file = run.save(2) / "rank_00000.safetensors"
    file.write_bytes(file.read_bytes()[:-4] + b"\0\0\0\1")
    assert run.load() == 1
    with monkeypatch.context() as patch, raises(PowerCutError):
        Mount(patch, "posix", cut_at=3)
        run.save(3)
    assert run.load() == 1
