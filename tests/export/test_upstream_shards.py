"""A run directory of upstream, written by its own code in two processes: gathered, and rejected elsewhere."""

import os
import shutil

import pytest
import torch

from dinov2_custom.cli import export_parser as get_args_parser
from dinov2_custom.errors import CheckpointError
from dinov2_custom.export.main import main
from dinov2_custom.models import vision_transformer as vits
from dinov2_custom.teacher import load_teacher
from dinov2_custom.train.checkpoint import has_checkpoints, set_aside
from dinov2_custom.train.pretrained import start_from_weights
from dinov2_custom.train.ssl_meta_arch import SSLMetaArch
from dinov2_custom.utils.run_folder import upstream_shards
from dinov2_custom.utils.weights import flat_heads, read_weights
from tests.export.upstream_fsdp import DEPTH, OVERRIDES
from tests.oracle import OracleUnavailable, ensure_oracle
from tests.oracle.trainer import reduced_depth
from tests.processes import launch
from tests.train.batches import tiny_config

KINDS = [f"{strategy}_{orig}" for strategy in ("SHARD_GRAD_OP", "FULL_SHARD") for orig in (True, False)]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    try:
        ensure_oracle()
    except OracleUnavailable as e:
        pytest.skip(str(e))
    folder = tmp_path_factory.mktemp("upstream")
    launch(2, "-m", "tests.export.upstream_fsdp", str(folder))
    return folder


@pytest.fixture
def run(runs, tmp_path):
    folder = tmp_path / os.fsdecode(b"not UTF-8 \xe9") / "run"
    shutil.copytree(runs / KINDS[0], folder)
    return folder


@pytest.fixture(autouse=True)
def shallow():
    with reduced_depth(vits, DEPTH):
        yield


def export(*arguments):
    return main(get_args_parser().parse_args([*map(str, arguments), "--to", "torch"]))


@pytest.mark.parametrize("kind", KINDS)
def test_the_teacher_is_gathered_whole_with_its_heads(runs, tmp_path, kind):
    assert export(runs / kind, "--output", tmp_path / "teacher.pth") == 0
    expected = torch.load(runs / kind / "expected.pth", weights_only=True)
    got = torch.load(tmp_path / "teacher.pth", weights_only=True)["teacher"]
    assert list(got) == list(expected)
    assert all(torch.equal(got[name], value) for name, value in expected.items())


def test_the_gathered_file_starts_a_run_and_is_a_teacher(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert export(run) == 0
    file = tmp_path / "outputs" / "export" / "run_torch.pth"
    expected = torch.load(run / "expected.pth", weights_only=True)
    assert load_teacher(str(file)).backbone.n_blocks == DEPTH
    assert set(flat_heads(read_weights(file))) == {"dino_head", "ibot_head"}
    cfg = tiny_config(*OVERRIDES, f"student.pretrained_weights={file}")
    model = SSLMetaArch(cfg)
    start_from_weights(cfg, model)
    assert all(torch.equal(value, expected[name]) for name, value in model.teacher.state_dict().items())


def test_a_run_is_not_begun_beside_it(run):
    before = sorted(run.iterdir())
    with pytest.raises(CheckpointError, match=r"--output-dir: .*facebookresearch/dinov2 .*--to torch.*--no-resume"):
        has_checkpoints(run)
    for source in (run / "model_0003749.rank_1.pth", run):
        with pytest.raises(CheckpointError, match="--to torch"):
            start = tiny_config(f"MODEL.WEIGHTS={source}")
            start_from_weights(start, SSLMetaArch(start))
    assert sorted(run.iterdir()) == before
    moved = set_aside(run, lambda: "then")
    assert {"model_0003749.rank_0.pth", "last_checkpoint.rank_1"} <= {path.name for path in moved.iterdir()}
    assert not has_checkpoints(run)


def test_the_newest_checkpoint_counts(run):
    assert [path.name for path in upstream_shards(run)] == [f"model_0003749.rank_{rank}.pth" for rank in (0, 1)]
    for rank in range(11):
        (run / f"model_0012499.rank_{rank}.pth").touch()
    assert [path.name for path in upstream_shards(run)] == [f"model_0012499.rank_{rank}.pth" for rank in range(11)]
    (run / "model_final.rank_0.pth").touch()
    assert [path.name for path in upstream_shards(run)] == ["model_final.rank_0.pth"]
    with pytest.raises(CheckpointError, match="--to torch"):  # of an older one, too
        read_weights(run / "model_0003749.rank_1.pth")


@pytest.mark.parametrize("kind", KINDS[:2])
def test_a_missing_file_and_another_configuration_are_reported(runs, run, tmp_path, kind):
    shutil.copytree(runs / kind, tmp_path / "missing")
    (tmp_path / "missing" / "model_0003749.rank_1.pth").unlink()
    with pytest.raises(CheckpointError, match=r"got 1 in .*not whole:\n  backbone.*\n.*\n.*\ncheck that no process"):
        export(tmp_path / "missing", "--output", tmp_path / "teacher.pth")
    other = tmp_path / "other.yaml"
    other.write_text((run / "config.yaml").read_text().replace("head_n_prototypes: 41", "head_n_prototypes: 82"))
    with pytest.raises(CheckpointError, match=r"last_layer.weight_v: expected 1722 numbers, got 861|not whole"):
        export(runs / kind, "--config-file", other, "--output", tmp_path / "teacher.pth")
    assert not (tmp_path / "teacher.pth").exists()


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (str(self.path),))


class Getattr:
    """An object pickled as a call of getattr, which returns a method if really called."""

    def __reduce__(self):
        return (getattr, ("text", "encode"))


@pytest.mark.parametrize("what", ["bomb", "getattr", "torn", "html"])
def test_nothing_of_a_file_is_run(run, tmp_path, what):
    shard = run / "model_0003749.rank_0.pth"
    if what == "torn":
        shard.write_bytes(shard.read_bytes()[:5000])
    elif what == "html":
        shard.write_bytes(b"<html>")
    else:
        torch.save({"model": {"teacher.x": Bomb(tmp_path / "ran") if what == "bomb" else Getattr()}}, shard)
    reason = "it is cut short" if what == "torn" else ""
    with pytest.raises(CheckpointError, match=f"facebookresearch/dinov2 at {shard}, could not read it: {reason}"):
        export(run, "--output", tmp_path / "teacher.pth")
    assert not (tmp_path / "ran").exists()
