"""Batches for a frozen model: in order, with any number of processes, without /dev/shm."""

import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch

from dinov2_custom.data import image_batches, pool
from dinov2_custom.data.datasets import LabelledFolder
from dinov2_custom.data.image_batches import ImageBatches, ImageLoader, batches, of_list
from dinov2_custom.data.transforms import make_classification_eval_transform
from dinov2_custom.errors import DataError, UnreadableImageError
from tests.data.pictures import encode, picture
from tests.processes import ENVIRONMENT, REPOSITORY

pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork.*:DeprecationWarning")
TRANSFORM = make_classification_eval_transform(resize_size=16, crop_size=16)


@pytest.fixture
def images(tmp_path, monkeypatch):
    monkeypatch.setattr(image_batches, "at_most_cores", lambda number: number)
    for i in range(7):
        path = tmp_path / "images" / ("ants" if i < 4 else "bees") / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode(picture(20 + i, 24, i)))
    yield tmp_path / "images"
    assert not [child for child in multiprocessing.active_children() if child.name.startswith("data-")]


def labelled(images):
    return LabelledFolder(str(images), transform=TRANSFORM)


@pytest.mark.parametrize("num_workers", [0, 1, 3])
def test_all_images_in_order_as_often_as_wanted(images, num_workers):
    dataset = labelled(images)
    indices, number = of_list([6, 0, 1, 2, 3], 2)
    loader = ImageLoader(dataset, indices, 2, num_workers=num_workers, stop=number)
    for _ in range(2):
        found = list(loader)
        assert [targets.tolist() for _, targets in found] == [[1, 0], [0, 0], [0]]
        expected = [dataset[i][0] for i in (6, 0, 1, 2, 3)]
        assert torch.equal(torch.cat([pixels for pixels, _ in found]), torch.stack(expected))
    assert list(ImageLoader(dataset, *of_list([], 2)[:1], 2, num_workers=num_workers, stop=0)) == []


def test_endless_loader_starts_at_the_given_position(images):
    dataset = labelled(images)
    loader = iter(ImageLoader(dataset, lambda i: [i % 7], 1, num_workers=1, start=20))
    assert [torch.equal(next(loader)[0][0], dataset[i % 7][0]) for i in range(20, 24)] == [True] * 4
    loader.close()


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_bad_image_is_an_error_with_its_name_or_left_out(images, num_workers):
    (images / "ants" / "2.png").write_bytes(b"broken")
    dataset = labelled(images)
    indices, number = of_list(range(7), 3)
    with pytest.raises(UnreadableImageError, match="ants/2.png"):
        list(ImageLoader(dataset, indices, 3, num_workers=num_workers, stop=number))
    builder = ImageBatches(dataset, indices, 3, (3, 16, 16), skip_bad=True)
    found = list(batches(builder, num_workers, stop=number))
    assert [batch.indices for batch in found] == [[0, 1], [3, 4, 5], [6]]
    assert list(found[0].bad) == [2] and "ants/2.png" in found[0].bad[2] and len(found[0].images) == 2


class Accident(LabelledFolder):
    """Image 3 kills the process that reads it, or never finishes."""

    kills = True

    def get_image_data(self, index):
        if index == 3:
            os.kill(os.getpid(), signal.SIGKILL) if self.kills else time.sleep(3600)
        return super().get_image_data(index)


def test_an_image_that_kills_two_processes_is_a_bad_one(images):
    indices, number = of_list(range(7), 3)
    builder = ImageBatches(Accident(str(images), TRANSFORM), indices, 3, (3, 16, 16), skip_bad=True)
    found = list(batches(builder, 2, stop=number))
    assert [batch.indices for batch in found] == [[0, 1, 2], [4, 5], [6]]
    assert "ants/3.png: two data-loading processes died of it" in found[1].bad[3]


def test_a_hang_names_the_process_and_the_image(images, monkeypatch):
    monkeypatch.setattr(pool, "LOOK_S", 0.1)
    monkeypatch.setattr(image_batches, "HANG_S", 2.0)
    dataset = Accident(str(images), TRANSFORM)
    dataset.kills = False
    indices, number = of_list(range(7), 3)
    stream = iter(ImageLoader(dataset, indices, 3, num_workers=1, stop=number))
    next(stream)
    with pytest.raises(DataError, match=r"data-loading process \d+ reads .*ants/3.png"):
        next(stream)


SMALL = """
import torch
from dinov2_custom.data import image_batches
image_batches.at_most_cores = lambda number: number
class Big(torch.utils.data.Dataset):
    def __len__(self): return 64
    def __getitem__(self, i): return torch.full((3, 224, 224), float(i)), i
indices, number = image_batches.of_list(range(64), 16)
for images, targets in image_batches.ImageLoader(Big(), indices, 16, num_workers=4, stop=number):
    assert torch.equal(images[:, 0, 0, 0], targets.float())
print("all", sum(f.stat().st_size for f in __import__("pathlib").Path("/dev/shm").iterdir()))
"""


def test_memory_of_batches_is_not_in_dev_shm():
    """Docker's default is 64 MB, here a sixteenth of that; a single batch has ten."""
    mount = "mount -t tmpfs -o size=4m tmpfs /dev/shm"
    command = ["unshare", "-m", "sh", "-c", mount]
    if not shutil.which("unshare") or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("needs root: mounts in a namespace of its own (unshare -m)")
    command = ["unshare", "-m", "sh", "-c", f'{mount} && exec "$0" -c "$1"', sys.executable, SMALL]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env={**os.environ, **ENVIRONMENT})
    assert done.returncode == 0 and done.stdout == "all 0\n", done.stderr


def test_embed_and_evaluations_use_these_loaders():
    """Only upstream's own function creates torch's DataLoader, so the properties tested here hold everywhere."""
    package = REPOSITORY / "dinov2_custom"
    users = [str(path.relative_to(package)) for path in package.rglob("*.py") if "DataLoader(" in path.read_text()]
    assert users == ["data/loaders.py"]
    assert not [path for part in ("eval", "embed") for path in (package / part).glob("*.py")
                if "make_data_loader" in path.read_text()]  # fmt: skip
