"""Backbones whose weights the user provides: chunked like upstream's, loaded fully or rejected, checked on request."""

from __future__ import annotations

import hashlib
import pathlib
import re

import pytest
import torch
from torch.testing import assert_close

from dinov2_custom.errors import CheckpointError
from dinov2_custom.hub.backbones import Weights, dinov2_vits14
from dinov2_custom.hub.cell_dino import backbones as cells
from dinov2_custom.hub.xray_dino.backbones import xray_dino_vitl16
from dinov2_custom.utils.weights import flat_name
from tests.hub.served import serve
from tests.oracle import preserved_rng
from tests.parity.conftest import oracle  # noqa: F401 - a fixture
from tests.parity.pair import unsettle

# name: (channels, patch size, pixels without a file, blocks, bag of channels)
FACTS = {
    "cell_dino_cp_vits8": (5, 8, 128, 12, False),
    "cell_dino_hpa_vitl16": (4, 16, 224, 24, False),
    "cell_dino_hpa_vitl14": (4, 14, 518, 24, False),
    "channel_adaptive_dino_vitl16": (1, 16, 224, 24, True),
    "xray_dino_vitl16": (3, 16, 512, 24, False),
}


@pytest.fixture(scope="module")
def upstreams(oracle):  # noqa: F811
    """Upstream's own ViT-S/8 of five channels and 64 pixels in four chunks, unsettled."""
    with preserved_rng(0):
        model = oracle.vits.vit_small(img_size=64, patch_size=8, in_chans=5, init_values=1.0, block_chunks=4).eval()
    unsettle(model, seed=1)
    return model


@pytest.fixture
def file(upstreams, tmp_path):
    """The file of upstream's model, its digest in its name, in a folder with a space."""
    (tmp_path / "my files").mkdir()
    path = tmp_path / "my files" / "weights.pth"
    torch.save(upstreams.state_dict(), path)
    return path.rename(path.with_name(f"cell_dino-{hashlib.sha256(path.read_bytes()).hexdigest()[:8]}.pth"))


@pytest.mark.parametrize("name", FACTS)
def test_structure(name):
    build = xray_dino_vitl16 if name == "xray_dino_vitl16" else getattr(cells, name)
    channels, patch, pixels, depth, bag = FACTS[name]
    with torch.device("meta"):
        model = build(pretrained=False)
        smaller = build(pretrained=False, img_size=2 * patch, block_chunks=0)
    assert model.patch_embed.proj.weight.shape[1:] == (channels, patch, patch)
    assert model.pos_embed.shape[1] == 1 + (pixels // patch) ** 2
    assert (model.n_blocks, model.bag_of_channels, model.register_tokens) == (depth, bag, None)
    assert (model.interpolate_antialias, model.interpolate_offset) == (False, 0.1)
    assert f"blocks.3.{depth - 1}.ls1.gamma" in model.state_dict() and len(model.blocks) == 4
    assert smaller.pos_embed.shape[1] == 5 and not smaller.chunked_blocks


@pytest.mark.parametrize("source", ["path", "file URL", "http URL"])
@torch.no_grad()
def test_features_are_upstreams(upstreams, file, source, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    with serve(file.parent) as (url, asked):
        weights = {"path": str(file), "file URL": file.as_uri(), "http URL": f"{url}/{file.name}"}[source]
        ours = cells.cell_dino_cp_vits8(weights=weights, check_hash=True).eval()
    assert len(asked) == (source == "http URL")
    assert list(ours.state_dict()) == list(upstreams.state_dict())
    images = torch.randn(2, 5, 64, 64, generator=torch.Generator().manual_seed(0))
    assert_close(ours(images), upstreams(images), rtol=1e-5, atol=1e-5)
    for n in (1, [2, 7]):
        for got, wanted in zip(
            ours.get_intermediate_layers(images, n), upstreams.get_intermediate_layers(images, n), strict=True
        ):
            assert_close(got, wanted, rtol=1e-5, atol=1e-5)


def test_flat_names_fill_the_chunks_too(upstreams, tmp_path):
    flat = {flat_name(name): value for name, value in upstreams.state_dict().items()}
    assert "blocks.11.norm1.weight" in flat
    torch.save(flat, tmp_path / "flat.pth")
    ours = cells.cell_dino_cp_vits8(weights=tmp_path / "flat.pth").state_dict()
    assert all(torch.equal(ours[name], value) for name, value in upstreams.state_dict().items())


def test_no_block_is_left_random(upstreams, tmp_path):
    first = {name: value for name, value in upstreams.state_dict().items() if not re.match(r"blocks\.[123]\.", name)}
    torch.save(first, tmp_path / "a_quarter.pth")
    with pytest.raises(CheckpointError, match=r"tensors of cell_dino_cp_vits8, got 126 missing.*\n  blocks.1.3.norm1"):
        cells.cell_dino_cp_vits8(weights=tmp_path / "a_quarter.pth")
    with pytest.raises(CheckpointError, match="tensors of cell_dino_hpa_vitl16, got 168 missing"):
        with torch.device("meta"):
            cells.cell_dino_hpa_vitl16(weights=_saved(upstreams, tmp_path))


def _saved(model, folder):
    torch.save(model.state_dict(), folder / "whole.pth")
    return folder / "whole.pth"


def test_a_digest_that_differs_is_refused(file, upstreams, tmp_path, caplog):
    torn = file.rename(file.with_name("cell_dino-0123abcd.pth"))
    cells.cell_dino_cp_vits8(weights=torn)  # no check requested
    with pytest.raises(CheckpointError, match="SHA-256 that starts with 0123abcd"):
        cells.cell_dino_cp_vits8(weights=torn, check_hash=True)
    with pytest.raises(CheckpointError, match="SHA-256 that starts with ad31c2b0"):
        xray_dino_vitl16(weights=_saved(upstreams, tmp_path), check_hash=True)
    cells.cell_dino_cp_vits8(weights=_saved(upstreams, tmp_path), check_hash=True)
    assert "check_hash: nothing to compare with" in caplog.text


def test_what_has_no_address_is_asked_for():
    for build in (cells.channel_adaptive_dino_vitl16, xray_dino_vitl16):
        with pytest.raises(CheckpointError, match=f"{build.__name__}: expected weights=, a path or URL"):
            build()
    with pytest.raises(CheckpointError, match="got Weights.XRAY_DINO, which has no public address"):
        dinov2_vits14(weights=Weights.XRAY_DINO)
    assert Weights("XRay-DINO") is Weights.XRAY_DINO


class Bad:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return pathlib.Path.mkdir, (self.folder,)


def test_no_code_of_a_file_is_run(tmp_path):
    torch.save({"cls_token": Bad(tmp_path / "ran")}, tmp_path / "bad.pth")
    with pytest.raises(CheckpointError, match="more than tensors"):
        cells.cell_dino_cp_vits8(weights=(tmp_path / "bad.pth").as_uri())
    assert not (tmp_path / "ran").exists()
