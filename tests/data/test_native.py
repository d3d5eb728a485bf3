"""Compiled colour changes: the pixels of the Python code exactly, and a fall-back for every way it may fail."""

import random
import shutil

import numpy as np
import pytest

from dinov2_custom.data import augmentations, compiler, native
from dinov2_custom.data.augmentations import DataAugmentationDINO, change_colours, change_colours_into
from dinov2_custom.data.draws import CropDraw
from tests.data.pictures import picture
from tests.data.test_finish import BOX, STRONG

needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, compiler.COMPILERS)), reason="needs a C compiler"
)


@pytest.fixture
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    native.colour_changer.cache_clear()
    yield tmp_path / "cache" / "dinov2_custom"
    native.colour_changer.cache_clear()


def check(draws, size, image):
    crop = np.array(image.resize((size, size)))
    for draw in draws:
        out = np.full((3, size, size), 7, np.uint8)
        change_colours_into(out, crop, draw)
        expected = change_colours(np.ascontiguousarray(crop.transpose(2, 0, 1)), draw)
        np.testing.assert_array_equal(out, np.broadcast_to(expected, out.shape), err_msg=str(draw))


@needs_compiler
@pytest.mark.parametrize("recipe", [None, STRONG], ids=["upstream", "strong"])
@pytest.mark.parametrize("size", [1, 2, 4, 9, 33, 96])
def test_compiled_pixels_are_pythons(recipe, size):
    assert native.colour_changer() is not None
    augment = DataAugmentationDINO((0.32, 1), (0.05, 0.32), 6, augmentation=recipe)
    for seed in range(6):
        check(augment.draw(70, 60, random.Random(seed)), size, picture(70, 60, seed))


@needs_compiler
def test_every_change_over_its_whole_range():
    image = picture(40, 30)
    for name, values in (("hue", np.linspace(-0.5, 0.5, 41)), ("contrast", np.linspace(0, 5, 41))):
        check([CropDraw((0, 0, 40, 30), False, ((name, float(v)),), False, None, False) for v in values], 24, image)
    sigmas = (0.1, 0.4, 1.0, 2.0, 30.0)
    check([CropDraw((0, 0, 40, 30), True, (), sigma > 1, sigma, True) for sigma in sigmas], 24, image)


@needs_compiler
def test_factors_that_are_too_large_are_left_to_python():
    draw = CropDraw((0, 0, 40, 30), True, (("brightness", 300.0),), False, None, False)
    out = np.full((3, 24, 24), 7, np.uint8)
    assert not native.colour_changer()(out, np.zeros((24, 24, 3), np.uint8), draw) and (out == 7).all()
    check([draw], 24, picture(40, 30))


@needs_compiler
def test_library_is_compiled_once_and_only_for_its_owner(own_cache, monkeypatch):
    assert native.colour_changer() is not None
    (library,) = own_cache.iterdir()
    assert own_cache.stat().st_mode & 0o077 == 0
    native.colour_changer.cache_clear()
    monkeypatch.setattr(compiler, "COMPILERS", ())
    assert native.colour_changer() is not None and list(own_cache.iterdir()) == [library]


def fallback(caplog, words: str) -> None:
    caplog.set_level("INFO", logger="dinov2")
    assert native.colour_changer() is None
    assert [words in record.message for record in caplog.records] == [True]
    check([CropDraw(BOX, False, (("hue", 0.1),), True, 1.0, True)], 16, picture(20, 20))


def test_without_a_compiler_python_does_it_and_says_so(own_cache, monkeypatch, caplog):
    monkeypatch.setattr(compiler, "COMPILERS", ("no-such-compiler",))
    fallback(caplog, "no C compiler (no-such-compiler)")


@needs_compiler
def test_a_compiler_that_fails_is_named(own_cache, monkeypatch, caplog, tmp_path):
    broken = tmp_path / "broken.c"
    broken.write_text("this is no C\n")
    monkeypatch.setattr(native, "COLOURS", broken)
    fallback(caplog, "failed: ")


@needs_compiler
def test_a_library_with_other_pixels_is_not_used(own_cache, monkeypatch, caplog):
    monkeypatch.setattr(augmentations.ops, "solarize", lambda crop: crop)
    fallback(caplog, "its pixels differ")


@needs_compiler
def test_a_cache_that_cannot_be_written_is_no_error(own_cache, monkeypatch, caplog, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    fallback(caplog, "Not a directory")


@needs_compiler
def test_a_library_that_somebody_else_could_have_put_there_is_not_loaded(own_cache, caplog):
    assert native.colour_changer() is not None
    (library,) = own_cache.iterdir()
    library.unlink()  # the old one is mapped into this process
    library.write_bytes(b"planted")
    library.chmod(0o777)
    native.colour_changer.cache_clear()
    assert native.colour_changer() is not None and library.read_bytes() != b"planted"
    own_cache.chmod(0o777)
    native.colour_changer.cache_clear()
    with caplog.at_level("INFO"):
        assert native.colour_changer() is None
    assert "others may write to it" in caplog.text
