import os
from types import SimpleNamespace

import pytest

from dinov2_custom.prepare.names import Names, Taken
from tests.verify.files import Listed


def dataset(names, **extra):
    listed = Listed(names)
    for key, value in extra.items():
        setattr(listed, key, value)
    return listed


def test_class_folders_stay(tmp_path):
    names = [str(tmp_path / "cells" / kind / "1.jpg") for kind in ("a", "b")]
    (tmp_path / "cells").mkdir()
    source = SimpleNamespace(roots=[str(tmp_path / "cells")])
    assert [Names.of(dataset(names, source=source))(name) for name in names] == ["a/1.jpg", "b/1.jpg"]
    one_class = dataset(names[:1], source=source)
    assert Names.of(one_class)(names[0]) == "a/1.jpg"
    assert Names.of(dataset(names[:1], root=str(tmp_path / "cells")))(names[0]) == "a/1.jpg"


def test_several_roots_get_distinct_labels(tmp_path):
    roots = [tmp_path / "x" / "images", tmp_path / "y" / "images", tmp_path / "z"]
    for root in roots:
        root.mkdir(parents=True)
    names = Names([str(root) for root in roots])
    found = [names(str(root / "c" / "1.jpg")) for root in roots]
    assert found == ["images/c/1.jpg", "images_2/c/1.jpg", "z/c/1.jpg"]


def test_parts_of_a_mixture(tmp_path):
    parts = []
    for name in ("x", "y"):
        (tmp_path / name).mkdir()
        parts.append(SimpleNamespace(source=SimpleNamespace(roots=[str(tmp_path / name)])))
    mixture = dataset([str(tmp_path / "x" / "1.jpg"), str(tmp_path / "y" / "1.jpg")], datasets=parts)
    assert [Names.of(mixture)(name) for name in mixture.paths] == ["x/1.jpg", "y/1.jpg"]


def test_without_roots_the_common_folder_counts():
    names = ["/data/set/a/1.jpg", "/data/set/b/2.jpg"]
    assert [Names.of(dataset(names))(name) for name in names] == ["a/1.jpg", "b/2.jpg"]
    flat = ["/data/set/a/1.jpg", "/data/set/a/2.jpg"]
    assert [Names.of(dataset(flat))(name) for name in flat] == ["a/1.jpg", "a/2.jpg"], "a may be a class"


@pytest.mark.parametrize(
    "name, wanted",
    [
        ("/d/shard-0.tar!cat/1.jpg", "cat/1.jpg"),
        ("/d/x.tar!../../etc/passwd", "etc/passwd"),
        ("HF[3]", "HF[3]"),
        ('a:b*c?"d".jpg', "a_b_c__d_.jpg"),
        ("a\nb.jpg", "a_b.jpg"),
        ("../..", "image"),
    ],
)
def test_names_are_safe(name, wanted):
    assert Names([])(name) == wanted


def test_a_name_with_an_exclamation_mark_is_a_file_if_it_is_there(tmp_path):
    (tmp_path / "wow!.jpg").touch()
    assert Names([str(tmp_path)])(str(tmp_path / "wow!.jpg")) == "wow!.jpg"


def test_names_are_used_once():
    taken = Taken(["a/1.jpg"])
    assert [taken.free(name) for name in ("a/1.jpg", "a/1.jpg", "A/1.JPG", "b")] == [
        "a/1_2.jpg", "a/1_3.jpg", "A/1_4.JPG", "b"]  # fmt: skip
    assert os.path.splitext(taken.free("b"))[0] == "b_2"
