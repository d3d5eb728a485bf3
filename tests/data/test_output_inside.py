"""A run that writes into its training folder never trains on its own output."""

import pytest

from dinov2_custom.logging import remove_logging
from dinov2_custom.train import get_args_parser, main
from tests.data.pictures import make_folder, picture
from tests.train.batches import TINY


@pytest.fixture(autouse=True)
def log_files_closed():
    yield
    remove_logging("dinov2")


def test_a_resumed_run_sees_the_images_of_its_first_start(tmp_path, capfd):
    make_folder(tmp_path / "images", [f"{i}.png" for i in range(6)])
    out = tmp_path / "images" / "run"

    def train(epochs: int) -> str:
        keys = (*TINY, "train.num_workers=0", "train.OFFICIAL_EPOCH_LENGTH=1", "optim.warmup_epochs=0")
        words = [*keys, f"optim.epochs={epochs}", f"train.dataset_path={tmp_path / 'images'}"]
        assert main(get_args_parser().parse_args(["--output-dir", str(out), *words])) == 0
        return (out / "logs" / "log.txt").read_text()

    assert "images: 6 found" in train(1)
    (out / "figures").mkdir()
    picture(30, 30).save(out / "figures" / "loss.png")
    log = train(2)
    assert log.count("images: 6 found") == 2 and "images: 7 found" not in log
    assert f"folder skipped: {out} (the output of a run" in "".join(capfd.readouterr())
