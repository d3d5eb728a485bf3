"""Loading weights with every kind of wrapper, seeds, git revision."""

import random
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from dinov2_custom.errors import CheckpointError
from dinov2_custom.utils import utils
from dinov2_custom.utils.run_folder import default_output, find_weights
from dinov2_custom.utils.utils import fix_random_seeds, get_sha, has_batchnorms, load_pretrained_weights
from tests.hub.served import serve
from tests.oracle import preserved_rng


class Net(nn.Module):
    """Two blocks, in one list or in chunks of one."""

    def __init__(self, chunked=False, width=3):
        super().__init__()
        blocks = [nn.ModuleDict({"fc": nn.Linear(width, width)}) for _ in range(2)]
        if chunked:
            blocks = [nn.ModuleList([nn.Identity()] * i + [block]) for i, block in enumerate(blocks)]
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.LayerNorm(width)
        for number, parameter in enumerate(self.parameters()):
            nn.init.constant_(parameter, -1.0 - number)


def _trained(prefix=""):
    """Return the state of a Net whose values differ from a new one's."""
    return {prefix + name: torch.full_like(value, 7.0) for name, value in Net().state_dict().items()}


def _is_loaded(model):
    return all(bool((value == 7.0).all()) for value in model.state_dict().values())


@pytest.mark.parametrize(
    "content, key",
    [
        (_trained(), "teacher"),
        ({"teacher": _trained("backbone.")}, "teacher"),
        ({"teacher": _trained("module.backbone.")}, None),
        ({"model": _trained("_orig_mod."), "optimizer": {}}, "teacher"),
        ({"student": _trained(), "mine": _trained()}, "mine"),
        ({"teacher": _trained("backbone.") | {"dino_head.mlp.0.weight": torch.ones(1)}}, "teacher"),
    ],
)
@pytest.mark.parametrize("chunked", [False, True])
def test_every_wrapping_loads(tmp_path, caplog, content, key, chunked):
    caplog.set_level("INFO", logger="dinov2")
    torch.save(content, tmp_path / "weights.pth")
    model = Net(chunked)
    load_pretrained_weights(model, tmp_path / "weights.pth", key)
    assert _is_loaded(model)
    assert "6 of 6 tensors loaded into Net, 0 missing, 0 unexpected" in caplog.text
    assert "WARNING" not in caplog.text  # heads are expected to be left out


def test_missing_and_unused_tensors_are_logged(tmp_path, caplog):
    state = _trained("backbone.")
    del state["backbone.norm.bias"]
    torch.save({"teacher": state | {"extra": torch.ones(1)}}, tmp_path / "weights.pth")
    model = Net()
    before = model.norm.bias.clone()
    load_pretrained_weights(model, tmp_path / "weights.pth", "teacher")
    assert "1 missing (norm.bias), 1 unexpected (extra)" in caplog.text
    assert torch.equal(model.norm.bias, before) and bool((model.norm.weight == 7).all())


def test_nothing_that_matches_is_an_error(tmp_path):
    torch.save({"conv.weight": torch.ones(1)}, tmp_path / "weights.pth")
    with pytest.raises(CheckpointError, match=r"(?s)tensors of Net, .*weights\.pth.*conv\.weight: unexpected"):
        load_pretrained_weights(Net(), tmp_path / "weights.pth", "teacher")


def test_other_shapes_are_an_error_and_change_nothing(tmp_path):
    torch.save(Net(width=4).state_dict(), tmp_path / "weights.pth")
    model = Net()
    message = r"norm.weight: expected \(3,\), got \(4,\)|fc.weight: expected .* got \(4, 4\)"
    with pytest.raises(CheckpointError, match=message):
        load_pretrained_weights(model, tmp_path / "weights.pth", "teacher")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), Net().parameters(), strict=True))


class Malicious:
    def __reduce__(self):
        return (exec, ("raise SystemExit('code of a weight file was run')",))


@pytest.mark.parametrize("content", ["torn", "empty", "object", "list", None])
def test_bad_files(tmp_path, content):
    path = tmp_path / "weights.pth"
    if content == "torn":
        torch.save(_trained(), path)
        path.write_bytes(path.read_bytes()[:500])
    elif content == "empty":
        path.write_bytes(b"")
    elif content == "object":
        torch.save({"teacher": Malicious()}, path)
    elif content == "list":
        torch.save([1, 2], path)
    with pytest.raises(CheckpointError, match="expected a weight file"):
        load_pretrained_weights(Net(), path, "teacher")


def test_urls_are_fetched(tmp_path, monkeypatch):
    torch.save(_trained(), tmp_path / "weights.pth")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    model = Net()
    with serve(tmp_path) as (url, _):
        load_pretrained_weights(model, f"{url}/weights.pth", "teacher")
        torch.save({"teacher": Malicious()}, tmp_path / "bad.pth")
        with pytest.raises(CheckpointError, match="more than tensors and plain values"):
            load_pretrained_weights(Net(), f"{url}/bad.pth", "teacher")
    assert _is_loaded(model)


def test_what_may_be_secret_in_an_address_is_not_logged(tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO", logger="dinov2")
    state = _trained()
    del state["norm.bias"]
    torch.save(state, tmp_path / "weights.pth")
    torch.save({"conv.weight": torch.ones(1)}, tmp_path / "other.pth")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    with serve(tmp_path) as (url, _):
        load_pretrained_weights(Net(), f"{url}/weights.pth?token=abc", "teacher")
        with pytest.raises(CheckpointError, match="tensors of Net") as e:
            load_pretrained_weights(Net(), f"{url}/other.pth?token=abc", "teacher")
    assert f"{url}/weights.pth: " in caplog.text and "token=" not in caplog.text + str(e.value)


def test_file_urls_are_paths(tmp_path):
    path = tmp_path / "my 100%" / "weights.pth"
    path.parent.mkdir()
    torch.save(_trained(), path)
    model = Net()
    load_pretrained_weights(model, path.as_uri(), "teacher")
    assert _is_loaded(model)
    assert find_weights(path.as_uri()) == str(path)
    assert default_output("embed", "https://lab/w.pth?token=a.b") == Path("outputs/embed/w")


def test_fix_random_seeds():
    def draw():
        return torch.rand(1).item(), np.random.rand(), random.random()

    with preserved_rng():
        fix_random_seeds(5)
        first = draw()
        fix_random_seeds(5)
        assert draw() == first
        fix_random_seeds(2**40)  # more than numpy accepts
        assert draw() != first


def test_get_sha_outside_a_checkout(monkeypatch, tmp_path):
    monkeypatch.setattr(utils, "__file__", str(tmp_path / "utils.py"))
    assert get_sha() == "sha: N/A, status: N/A, branch: N/A"


def test_get_sha_in_a_checkout(monkeypatch, tmp_path):
    def git(*arguments):
        settings = ["-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "init.defaultBranch=trunk"]
        subprocess.run(["git", "-C", str(tmp_path), *settings, *arguments], check=True, capture_output=True)

    file = tmp_path / "utils.py"
    file.write_text("1")
    git("init")
    monkeypatch.setattr(utils, "__file__", str(file))
    assert get_sha().startswith("sha: N/A")  # the file does not belong to the repository that contains it
    git("add", "utils.py")
    git("commit", "-m", "x")
    assert get_sha().endswith("status: clean, branch: trunk") and len(get_sha().split()[1]) == 41
    file.write_text("2")
    assert "status: has uncommitted changes" in get_sha()


def test_has_batchnorms():
    assert has_batchnorms(nn.Sequential(nn.Sequential(nn.BatchNorm1d(2))))
    assert has_batchnorms(nn.SyncBatchNorm(2))
    assert not has_batchnorms(Net())
