"""Tar shards: the scan compared with the standard library, names, truncation, patterns and errors."""

import io
import os
import pickle
import tarfile
import tracemalloc
from pathlib import Path

import pytest

from dinov2_custom.data.datasets import SourceDataset
from dinov2_custom.data.tar_shards import Member, TarSource, expand_braces, find_files, walk_tar
from dinov2_custom.errors import DataError
from tests.data.pictures import encode, picture

LONG = "a" * 90 + "/" + "b" * 120 + "/" + "é" * 80 + ".jpg"


def write(path, files: dict[str, bytes], kind: int = tarfile.GNU_FORMAT, mode: str = "w") -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode, format=kind) as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return str(path)


def by_tarfile(path) -> list[Member]:
    with tarfile.open(path) as tar:
        return [Member(member.name, member.offset_data, member.size) for member in tar if member.isreg()]


@pytest.mark.parametrize("kind", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_walk_finds_what_the_standard_library_finds(tmp_path, kind):
    deep = "d" * 40 + "/" + "n" * 90 + ".jpg"
    files = {"0001.jpg": b"x" * 700, "0001.json": b"{}", "empty.png": b"", deep: b"y" * 512}
    if kind != tarfile.USTAR_FORMAT:
        files |= {LONG: b"z" * 513, "é/ü.jpg": b"w", "last.jpg": b"v"}
    path = write(tmp_path / "x.tar", files, kind)
    with tarfile.open(path, "a", format=kind) as tar:
        folder, link, hard = tarfile.TarInfo("folder"), tarfile.TarInfo("link.jpg"), tarfile.TarInfo("hard.jpg")
        folder.type, link.type, hard.type = tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE
        link.linkname = hard.linkname = "0001.jpg"
        for member in (folder, link, hard):
            tar.addfile(member)
        tar.addfile(tarfile.TarInfo("after.jpg"))
    members = walk_tar(path).members
    assert [member for member in members if member.name not in ("link.jpg", "hard.jpg")] == by_tarfile(path)
    assert [member.name for member in members] == [*files, "link.jpg", "hard.jpg", "after.jpg"]
    first = members[0]
    assert [member[1:] for member in members if member.name in ("link.jpg", "hard.jpg")] == [first[1:], first[1:]]


def test_walk_reads_pax_sizes_global_headers_and_large_numbers(tmp_path):
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT, pax_headers={"comment": "all = of them"}) as tar:
        member = tarfile.TarInfo("a.jpg")
        member.size, member.pax_headers = 5, {"size": "5", "mtime": "1.5", "note": "a=b"}
        tar.addfile(member, io.BytesIO(b"12345"))
        tar.addfile(tarfile.TarInfo("b.jpg"))
    assert walk_tar(str(path)).members == by_tarfile(path) and walk_tar(str(path)).members[0].size == 5
    large = tarfile.TarInfo("large.jpg")
    large.size = 9 << 30  # more than eleven octal digits
    path.write_bytes(large.tobuf(tarfile.GNU_FORMAT))
    assert walk_tar(str(path)).members == [Member("large.jpg", 512, 9 << 30)]


def test_walk_does_not_hold_the_contents(tmp_path):
    path = write(tmp_path / "x.tar", {f"{i}.jpg": bytes(1 << 20) for i in range(8)})
    tracemalloc.start()
    assert len(walk_tar(path).members) == 8
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100_000


def test_source_over_shards(tmp_path):
    pictures = [encode(picture(8, 6, seed=i), "PNG") for i in range(6)]
    for shard in range(3):
        files = {f"{2 * shard + i:04d}.{kind}": data for i in range(2) for kind, data in (
            ("PNG", pictures[2 * shard + i]), ("json", b"{}"), ("cls", b"3"))}  # fmt: skip
        write(tmp_path / f"s-{shard:04d}.tar", files)
    pattern = str(tmp_path / "s-{0000..0002}.tar")
    source = TarSource(pattern)
    assert len(source) == 6 and [source.read(i) for i in range(6)] == pictures
    assert source.name(3) == f"{tmp_path}/s-0001.tar!0003.PNG"
    assert source.parts() == [(str(tmp_path / f"s-000{i}.tar"), 2) for i in range(3)]
    again = pickle.loads(pickle.dumps(source))
    assert [again.read(i) for i in (5, 0, 3, 3)] == [pictures[i] for i in (5, 0, 3, 3)]
    assert [TarSource(place).name(4) for place in (tmp_path, [tmp_path / "s-0002.tar", tmp_path])] == [
        f"{tmp_path}/s-0002.tar!0004.PNG",
        f"{tmp_path}/s-0001.tar!0002.PNG",
    ]
    image, target = SourceDataset(source)[2]
    assert target == () and image.tobytes() == picture(8, 6, seed=2).tobytes()
    assert sorted(os.listdir(tmp_path)) == ["s-0000.tar", "s-0001.tar", "s-0002.tar"]


def test_hidden_members_are_no_images(tmp_path):
    path = write(tmp_path / "x.tar", {"._a.jpg": b"0", "./a.jpg": b"1", "d/.b.jpg": b"2", "d/b.JPG": b"3"})
    source = TarSource(path)
    assert [source.read(i) for i in range(len(source))] == [b"1", b"3"]


def test_index_of_shards_is_kept_until_one_changes(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = write(tmp_path / "x.tar", {"a.jpg": b"1", "b.jpg": b"22"})
    os.utime(path, (1e9, 1e9))
    TarSource(path, cache_from=1)
    with monkeypatch.context() as patched:
        patched.setattr("dinov2_custom.data.tar_shards.walk_tar", None)  # so that walking again would fail
        source = TarSource(path, cache_from=1)
    assert source.read(1) == b"22" and source.index.file
    write(tmp_path / "x.tar", {"a.jpg": b"333"})
    assert len(TarSource(path, cache_from=1)) == 1 and TarSource(path, cache_from=1).read(0) == b"333"


@pytest.mark.parametrize("left, readable, words", [
    (512 + 512 + 512 + 700, 1, "ends in the middle of b.jpg"),  # in b's data
    (512 + 512 + 512, 1, "ends in the middle of b.jpg"),  # right after b's header
    (512 + 512 + 100, 1, "1 files before it are used"),  # in b's header
    (512 + 512, 1, ""),  # between the two, without the end mark
    (512 + 512 + 512 + 1024, 2, ""),  # only the end mark is missing
])  # fmt: skip
def test_truncated_tar_gives_the_complete_files(tmp_path, left, readable, words):
    path = write(tmp_path / "x.tar", {"a.jpg": b"1" * 512, "b.jpg": b"2" * 1024})
    with open(path, "r+b") as file:
        file.truncate(left)
    source = TarSource(path)
    assert [(where, words in why) for where, why in source.passed_over()] == ([(path, True)] if words else [])
    assert [source.read(i) for i in range(readable)] == [b"1" * 512, b"2" * 1024][:readable]
    if len(source) > readable:
        with pytest.raises(DataError, match=r"expected 1,024 bytes, got [\d,]+, the file ends there: .*x\.tar!b\.jpg"):
            source.read(1)


def damage(path, position=1024):
    """Change a byte of the second header and make the file older, so that its index can be cached."""
    with open(path, "r+b") as file:
        file.seek(position + 10)
        file.write(b"!")
    os.utime(path, (1e9, 1e9))


def test_what_a_damaged_header_hides_is_logged_at_every_start(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = write(tmp_path / "x.tar", {"a.jpg": b"1", "b.jpg": b"2"})
    damage(path)
    hidden = os.path.getsize(path) - 1024
    reasons = []
    for start in range(2):
        caplog.clear()
        dataset = SourceDataset(TarSource(path, cache_from=1))
        [(where, reason)] = dataset.passed_over()
        assert where == path and "byte=1024" in reason and f"1 files before it are used, {hidden:,} bytes" in reason
        assert f"{path} ({reason})" in caplog.text and dataset.source.index.file
        if not start:
            monkeypatch.setattr("dinov2_custom.data.tar_shards.walk_tar", None)  # so that walking again would fail
        reasons.append(reason)
    assert len(dataset) == 1 and reasons[0] == reasons[1]


def test_a_tar_behind_another_and_sparse_images_are_passed_over(tmp_path):
    one, two = (write(tmp_path / name, {f"{name}.jpg": b"1"}) for name in ("a.tar", "b.tar"))
    with open(one, "ab") as file, open(two, "rb") as other:
        file.write(other.read())
    [(where, reason)] = TarSource(one).passed_over()
    assert where == one and "byte=10240" in reason and "10,240 bytes" in reason
    assert TarSource(two).passed_over() == []
    sparse = tarfile.TarInfo("sparse.jpg")
    sparse.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0"}
    data = Path(two).read_bytes()[:1024]
    Path(two).write_bytes(data + sparse.tobuf(tarfile.PAX_FORMAT) + bytes(1024))
    [(_, reason)] = TarSource(two).passed_over()
    assert "1 files skipped: sparse" in reason and "sparse.jpg" in reason


def test_folders_of_shards_that_cannot_be_read_are_passed_over(tmp_path, monkeypatch):
    write(tmp_path / "a" / "x.tar", {"a.jpg": b"1"})
    write(tmp_path / "b" / "y.tar", {"b.jpg": b"1"})
    scandir = os.scandir

    def refuse(folder):
        if str(folder).endswith("b"):
            raise PermissionError(13, "Permission denied")
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", refuse)
    source = TarSource(tmp_path)
    assert len(source) == 1 and [place for place, _ in source.passed_over()] == [str(tmp_path / "b")]


@pytest.mark.parametrize("mode, name", [("w:gz", "gzip"), ("w:bz2", "bzip2"), ("w:xz", "xz")])
def test_compressed_tars_are_all_named(tmp_path, mode, name):
    paths = [write(tmp_path / f"{i}.tar.z", {"a.jpg": b"1"}, mode=mode) for i in range(2)]
    with pytest.raises(DataError, match=f"compressed with {name}.*decompress it.*; .*compressed with {name}") as e:
        TarSource(paths)
    assert all(path in str(e.value) for path in paths)


def test_files_that_are_no_tar_or_have_no_image(tmp_path):
    (tmp_path / "x.tar").write_bytes(b"hello " * 200)
    with pytest.raises(DataError, match="x.tar"):
        TarSource(tmp_path / "x.tar")
    (tmp_path / "empty.tar").write_bytes(b"")
    with pytest.raises(DataError, match="expected images .* in tar files, got none in .*empty.tar"):
        TarSource(tmp_path / "empty.tar")
    write(tmp_path / "text.tar", {"a.txt": b"1"})
    with pytest.raises(DataError, match="tar -tf"):
        TarSource(tmp_path / "text.tar")
    with pytest.raises(DataError) as e:
        TarSource([tmp_path / "s-{0..2}.tar", tmp_path / "text.tar"])
    assert all(f"s-{i}.tar (missing)" in str(e.value) for i in range(3)) and "train.dataset_path" in str(e.value)
    (tmp_path / "folder").mkdir()
    with pytest.raises(DataError, match="folder with none"):
        TarSource(tmp_path / "folder")


def test_shard_that_disappears_is_a_data_error(tmp_path):
    path = write(tmp_path / "x.tar", {"a.jpg": b"1"})
    source = TarSource(path)
    os.remove(path)
    with pytest.raises(DataError, match=r"x\.tar!a\.jpg \(FileNotFoundError"):
        source.read(0)


@pytest.mark.parametrize("pattern, expanded", [
    ("a.tar", ["a.tar"]),
    ("{0..2}", ["0", "1", "2"]),
    ("{08..11}", ["08", "09", "10", "11"]),
    ("{8..11}", ["8", "9", "10", "11"]),
    ("{a,b}-{1..2}.tar", ["a-1.tar", "a-2.tar", "b-1.tar", "b-2.tar"]),
    ("{x}/{0..1}", ["{x}/0", "{x}/1"]),
    ("{", ["{"]),
])  # fmt: skip
def test_braces_expand_as_in_a_shell(pattern, expanded):
    assert list(expand_braces(pattern)) == expanded


def test_existing_name_with_braces_is_taken_literally(tmp_path):
    path = write(tmp_path / "s-{0..1}.tar", {"a.jpg": b"1"})
    assert find_files([path], (".tar",), "tars") == [path]


def linked(name: str, target: str, kind: bytes) -> bytes:
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, target
    return member.tobuf(tarfile.PAX_FORMAT)


def test_links_have_the_bytes_of_their_target(tmp_path):
    path = tmp_path / "x.tar"
    long = "l" * 120 + ".jpg"
    write(path, {"./d/a.jpg": b"1", long: b"2"}, tarfile.PAX_FORMAT)
    links = [
        linked("d/e/b.jpg", "../a.jpg", tarfile.SYMTYPE),
        linked("c.jpg", "d/a.jpg", tarfile.LNKTYPE),
        linked("d.jpg", "c.jpg", tarfile.SYMTYPE),
        linked("e.jpg", long, tarfile.LNKTYPE),
        linked("lost.jpg", "nowhere.jpg", tarfile.SYMTYPE),
        linked("self.jpg", "self.jpg", tarfile.SYMTYPE),
        linked("out.jpg", "/etc/hostname", tarfile.SYMTYPE),
        linked("latest", "d", tarfile.SYMTYPE),  # no image: nothing is lost
    ]
    data = path.read_bytes().rstrip(b"\0")
    path.write_bytes(data + bytes(-len(data) % 512) + b"".join(links) + bytes(1024))
    source = TarSource(path)
    assert [source.read(i) for i in range(len(source))] == [b"1", b"2", b"1", b"1", b"1", b"2"]
    [(where, reason)] = source.passed_over()
    assert where == str(path) and "3 files skipped: links" in reason and "lost.jpg" in reason


def test_a_lone_block_of_zeros_does_not_hide_the_files_after_it(tmp_path, caplog):
    path = tmp_path / "x.tar"
    write(path, {"a.jpg": b"1", "b.jpg": b"2"})
    data = path.read_bytes()
    path.write_bytes(data[:1024] + bytes(512) + data[1024:])
    assert [member.name for member in walk_tar(str(path)).members] == ["a.jpg", "b.jpg"]
    assert "lone block of zeros" in caplog.text and "byte=1024" in caplog.text


def header_with(size_field: bytes, name: str = "b.jpg") -> bytes:
    header = bytearray(tarfile.TarInfo(name).tobuf(tarfile.GNU_FORMAT))
    header[124:136] = size_field.ljust(12, b"\0")
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header)


def pax_sized(size: str) -> bytes:
    member = tarfile.TarInfo("b.jpg")
    member.pax_headers = {"size": size}
    return member.tobuf(tarfile.PAX_FORMAT)


@pytest.mark.parametrize("header, found", [
    (header_with(b"100000000000"), 2),  # 8 GiB
    (header_with(b"\x80" + (8 << 40).to_bytes(11, "big")), 2),
    (header_with(b"\x80" + (2**63 - 1).to_bytes(11, "big")), 1),
    (header_with(b"\x80" + b"\xff" * 11), 1),
    (header_with(b"\xff" * 12), 1),  # negative
    (header_with(b"-0000001000"), 1),
    (header_with(b"1_0"), 1),
    (pax_sized("9223372036854775807"), 1),
    (pax_sized("-1024"), 1),
    (pax_sized("9" * 5000), 1),
    (pax_sized("12 monkeys"), 1),
])  # fmt: skip
def test_sizes_that_no_file_has_end_the_walk_and_not_the_run(tmp_path, header, found):
    path = tmp_path / "x.tar"
    write(path, {"a.jpg": b"1"})
    path.write_bytes(path.read_bytes()[:1024] + header + bytes(1024))
    source = TarSource(path)
    assert len(source) == found and source.read(0) == b"1"
    [(_, reason)] = source.passed_over()
    assert "damaged tar" in reason or "truncated tar" in reason
    for i in range(1, found):
        with pytest.raises(DataError, match="b.jpg"):
            source.read(i)


def test_a_pattern_for_a_hundred_million_files_is_refused_before_it_is_expanded():
    for pattern in ("{000000000..099999999}.tar", "{0..9999}/{0..9999}.tar", "{1..999999999999}"):
        with pytest.raises(DataError, match="at most 1,000,000 files"):
            expand_braces(pattern)
