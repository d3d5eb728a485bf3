"""Position embeddings for other grids, square or not: eager, traced and in a traced ONNX graph."""

from __future__ import annotations

import io

import pytest
import torch
import torch.nn.functional as F

from dinov2_custom.hub import backbones
from dinov2_custom.models import vision_transformer as vits
from dinov2_custom.models.pos_embed import _cubic_weights, resample_pos_embed

SIZES = [(56, 56), (84, 84), (28, 28), (56, 84), (70, 42)]  # of a model for 56 x 56
tracer_warns = pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")


def hub_model(name, img_size=56):
    """Return a hub model cut to two blocks, whose positions affect the output."""
    torch.manual_seed(0)
    model = getattr(backbones, name)(pretrained=False, img_size=img_size).eval().requires_grad_(False)
    model.blocks, model.n_blocks = model.blocks[:2], 2
    model.pos_embed.normal_()
    return model


def random_images(size, count=1):
    return torch.randn(count, 3, *size, generator=torch.Generator().manual_seed(1))


@tracer_warns
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("name", ["dinov2_vits14", "dinov2_vits14_reg"])
def test_a_hub_model_is_traced_at_any_size(name, size):
    model = hub_model(name)
    traced = torch.jit.trace(model, random_images(size))
    images = random_images(size, count=2) + 1  # other sizes than in the trace
    torch.testing.assert_close(traced(images), model(images), rtol=0, atol=1e-5)


@tracer_warns
def test_a_trace_of_exact_sizes_serves_others():
    """Released models with registers resample to an exact size, which a trace records as a computation."""
    model = hub_model("dinov2_vits14_reg")
    traced = torch.jit.trace(model, random_images((84, 70)))
    for size in ((56, 42), (98, 70)):
        torch.testing.assert_close(traced(random_images(size)), model(random_images(size)), rtol=0, atol=1e-5)


@tracer_warns
def test_a_trace_of_a_scale_factor_refuses_other_sizes():
    model = hub_model("dinov2_vits14")
    traced = torch.jit.trace(model, random_images((84, 70)))
    with pytest.raises(RuntimeError, match="must match the size"):
        traced(random_images((98, 70)))


@tracer_warns
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("name", ["dinov2_vits14", "dinov2_vits14_reg"])
def test_a_traced_onnx_graph_at_any_size(name, size):
    runtime = pytest.importorskip("onnxruntime", reason="NO ONNX CHECK: the extra 'export' is not installed")
    model, file = hub_model(name), io.BytesIO()
    torch.onnx.export(
        model, (random_images(size),), file, dynamo=False, input_names=["image"], dynamic_axes={"image": {0: "batch"}}
    )
    session = runtime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])
    images = random_images(size, count=2) + 1
    (features,) = session.run(None, {"image": images.numpy()})
    torch.testing.assert_close(torch.from_numpy(features), model(images), rtol=0, atol=1e-4)


@pytest.mark.parametrize("sizes", [(5, 5), (8, 5), (3, 5), (1, 5), (37, 16), (16, 37), (1, 37)], ids=str)
def test_cubic_weights_are_those_of_interpolate(sizes):
    size, source_size = sizes
    columns = torch.eye(source_size)[None, None]  # one unit vector per position
    wanted = F.interpolate(columns, size=(size, source_size), mode="bicubic", antialias=True)
    torch.testing.assert_close(_cubic_weights(size, source_size), wanted[0, 0], rtol=0, atol=1e-6)


def make(img_size, **kwargs):
    torch.manual_seed(0)
    model = vits.vit_nano(img_size=img_size, patch_size=4, block_chunks=0, **kwargs).eval().requires_grad_(False)
    model.pos_embed.normal_()
    return model


@pytest.mark.parametrize("offset", [0.0, 0.1])
def test_a_model_for_images_that_are_no_squares(offset):
    model = make((16, 24), interpolate_offset=offset)
    assert model.pos_embed.shape == (1, 1 + 4 * 6, 64)
    assert model.interpolate_pos_encoding(torch.zeros(1, 25, 64), 16, 24) is model.pos_embed
    turned = model.interpolate_pos_encoding(torch.zeros(1, 25, 64), 24, 16)  # as many patches, another grid
    assert turned.shape == model.pos_embed.shape and not torch.equal(turned, model.pos_embed)
    grid = model.pos_embed[:, 1:].view(1, 4, 6, 64).permute(0, 3, 1, 2)
    for rows, columns in ((6, 4), (5, 5), (8, 12), (2, 3)):
        how = {"scale_factor": ((rows + 0.1) / 4, (columns + 0.1) / 6)} if offset else {"size": (rows, columns)}
        wanted = F.interpolate(grid, mode="bicubic", **how).flatten(2).transpose(1, 2)
        got = model.interpolate_pos_encoding(torch.zeros(1, 1 + rows * columns, 64), 4 * rows, 4 * columns)
        assert torch.equal(got[:, 1:], wanted) and torch.equal(got[:, :1], model.pos_embed[:, :1])
        assert model(torch.zeros(1, 3, 4 * rows, 4 * columns)).isfinite().all()


def test_a_square_model_whose_positions_were_replaced():
    model = make(16)
    model.pos_embed = torch.nn.Parameter(torch.randn(1, 1 + 9, 64))
    assert model.interpolate_pos_encoding(torch.zeros(1, 10, 64), 12, 12) is model.pos_embed
    assert model(torch.zeros(1, 3, 16, 16)).shape == (1, 64)


def test_a_grid_that_the_positions_do_not_form_is_refused():
    with pytest.raises(ValueError, match="square grid"):
        resample_pos_embed(torch.zeros(1, 1 + 12, 4), (2, 2))
    with pytest.raises(ValueError, match="3x5 grid to resample from, got 12"):
        resample_pos_embed(torch.zeros(1, 1 + 12, 4), (2, 2), source_grid=(3, 5))
