"""The commands as functions: a run and what is made of it, in this process."""

import importlib.util
import logging
import multiprocessing.spawn
import os
import random
import re
import signal
import sys
import warnings
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

import dinov2_custom as d
from dinov2_custom import api
from dinov2_custom.errors import ConfigError, DataError, LaunchError
from dinov2_custom.logging import remove_logging
from dinov2_custom.train.step_guard import StepGuard
from tests.train.batches import TINY
from tests.train.test_train import write_images

PAGE = Path(__file__).resolve().parents[1] / "docs" / "python.md"
SHORT = {key: yaml.safe_load(value) for key, value in (text.split("=") for text in TINY)}
SHORT |= {"train.num_workers": 0, "train.max_steps": 2, "train.log_every": 1, "optim.warmup_epochs": "10%"}
SHORT["student.arch"] = "vit_micro"


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("images"), 8)


@pytest.fixture(scope="module")
def run(images, tmp_path_factory):
    return d.pretrain(images, tmp_path_factory.mktemp("run") / "out", overrides=SHORT)


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    yield
    remove_logging("dinov2")


def test_a_run_has_its_metrics_configuration_and_curves(run, images):
    rows = run.metrics.to_dict("records") if importlib.util.find_spec("pandas") else run.metrics
    assert [row["iteration"] for row in rows] == [0, 1]
    assert run.config.student.arch == "vit_micro" and run.config.optim.base_lr == 1e-3, "of vits.yaml"
    assert run.config.train.dataset_path == str(images)
    with api._running:  # while another call is, as in a thread
        assert run.plot().read_bytes()[:4] == b"\x89PNG"
    command = re.search(r"command: (.*)", (run.out / "logs" / "log.txt").read_text())[1]
    assert command.startswith("dinov2-custom train ") and f"--output-dir={run.out}" in command
    assert "dinov2-custom knn" in (run.out / "logs" / "log.txt").read_text()
    assert re.search(r"config: .*/configs/vits.yaml", (run.out / "logs" / "log.txt").read_text())


def test_rows_are_dicts_without_pandas(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    assert [row["iteration"] for row in run.metrics] == [0, 1]


def test_the_teacher_knows_its_images(run, images):
    """Of any architecture: torch.hub has no name for vit_micro."""
    model = run.teacher()
    assert model.image_size == 16 and not model.training and model.normalize["mean"] == (0.485, 0.456, 0.406)
    picture = model.preprocess(Image.open(images / "class_0" / "0.png"))
    assert model(picture.unsqueeze(0)).shape == (1, model.embed_dim)


def test_features_neighbours_and_an_export(run, images):
    result = d.embed(run, images, batch_size=3, num_workers=0)
    assert result.features.shape == (8, run.teacher().embed_dim) and len(result.rows) == 8
    assert result.folder == Path("outputs/embed/out")
    again = d.embed(run.out, images, batch_size=3, num_workers=0)
    assert np.array_equal(result.features, again.features)
    scores = d.knn(run, images, f"LabelledFolder:root={images}", nb_knn=[1, 2], num_workers=0)
    assert set(scores) == {f"('full', {k}) Top {n}" for k in (1, 2) for n in (1, 5)}
    path = d.export(run, "torch")
    assert path == Path("outputs/export/out_torch.pth")
    assert torch.equal(d.load(path).cls_token, run.teacher().cls_token)


def test_several_folders_numpy_numbers_and_results_of_this_call_alone(run, images, tmp_path):
    result = d.embed(run, [images / "class_0", images / "class_1"], num_workers=0, batch_size=np.int64(3))
    assert len(result.rows) == 8
    for ks in (range(1, 3), np.array([3])):
        scores = d.knn(run, images, images, tmp_path / "knn", nb_knn=ks, num_workers=0)
        assert set(scores) == {f"('full', {k}) Top {n}" for k in ks for n in (1, 5)}


def test_the_process_is_as_before(run, images):
    """Logging, command line, threads and random numbers are the caller's."""
    ours = logging.getLogger("dinov2")
    logging.captureWarnings(True)
    try:
        states = [
            (
                torch.get_rng_state().tolist(),
                np.random.get_state()[1].tolist(),
                random.getstate(),
                sys.argv,
                os.getcwd(),
            )
            + (torch.get_num_threads(), signal.getsignal(signal.SIGINT), warnings.showwarning)
            + (ours.level, ours.propagate, list(ours.handlers), list(logging.root.handlers))
            for call in (lambda: None, lambda: d.embed(run, images, num_workers=0), run.teacher, run.resume)
            if [call()]
        ]
    finally:
        logging.captureWarnings(False)
    assert all(state == states[0] for state in states[1:])


def test_one_call_at_a_time(run, images):
    with api._running:
        with pytest.raises(LaunchError, match="one call at a time"):
            d.embed(run, images)
    d.embed(run, images, num_workers=0)


def test_a_stop_saves_and_raises_and_the_run_goes_on(images, tmp_path, monkeypatch, capsys):
    check = StepGuard.check

    def stop_in_first_step(self, iteration, *args):
        if iteration == 0:
            os.kill(os.getpid(), signal.SIGINT)
        return check(self, iteration, *args)

    monkeypatch.setattr(StepGuard, "check", stop_in_first_step)
    with pytest.raises(KeyboardInterrupt, match="saved"):
        d.pretrain(images, tmp_path / "out", overrides=SHORT | {"train.max_steps": 4})
    run = d.Run(tmp_path / "out")
    assert len(run.metrics) < 4
    assert len(run.resume().metrics) == 4
    assert len(run.resume({"train.max_steps": 5}).metrics) == 5


def test_mistakes_are_errors_of_ours(tmp_path, images, capsys):
    with pytest.raises(ConfigError, match="did you mean optim.epochs"):
        d.pretrain(images, tmp_path / "out", overrides={"optim.epoch": 3})
    with pytest.raises(ConfigError, match=r"got epochs; a configuration key is given as overrides=.*optim.epochs"):
        d.pretrain(images, tmp_path / "out", epochs=3)
    with pytest.raises(ConfigError, match="--nb_knn: invalid int value"):
        d.knn("out", images, images, nb_knn="many")
    with pytest.raises(ConfigError, match="vits.yaml"):
        d.pretrain(images, tmp_path / "out", config="vitz.yaml")
    with pytest.raises(DataError):
        d.Run(tmp_path / "out").metrics  # noqa: B018
    with pytest.raises(ConfigError, match="give the directory of a training"):
        d.Run(tmp_path / "out").resume()
    with pytest.raises(ConfigError, match="overrides: expected a mapping"):
        d.pretrain(images, tmp_path / "out", overrides=["optim.epochs=3"])
    with pytest.raises(ConfigError, match="output_dir from the function's own argument"):
        d.pretrain(images, tmp_path / "out", output_dir="other")
    with pytest.raises(ConfigError, match="output_dir from the function's own argument"):
        d.export("out", "torch", "a.pth", output_dir="other")
    d.pretrain(images, tmp_path / "out", overrides=SHORT, dry_run=True)
    assert f"cd {tmp_path} && dinov2-custom train " in capsys.readouterr().out
    with pytest.raises(ConfigError, match="got help"):
        d.pretrain(images, tmp_path / "out", help=True)
    with pytest.raises(TypeError):
        d.embed(torch.nn.Identity(), images)
    assert not (tmp_path / "out").exists()


def test_values_of_overrides_keep_their_types():
    values = {"a": "null", "b": 1e-5, "c": True, "d": None, "e": [Path("/x y"), "[z]"], "f": "10%"}
    values |= {"g": np.int64(2), "h": np.array([0.5, 1.0]), "i": np.bool_(False), "j": range(2), "k": torch.tensor(3)}
    values["l"] = 1j
    from dinov2_custom.configs.load import Mistakes, read_overrides

    read = read_overrides(api._opts(values), Mistakes())
    assert {s.key: s.value for s in read} == values | {
        "e": ["/x y", "[z]"], "g": 2, "h": [0.5, 1.0], "i": False, "j": [0, 1], "k": 3, "l": "1j"
    }  # fmt: skip


def test_spawned_processes_do_not_import_the_script(monkeypatch, tmp_path):
    of_main = vars(sys.modules["__main__"])
    monkeypatch.setitem(of_main, "__spec__", None)
    monkeypatch.setitem(of_main, "__file__", str(tmp_path / "script.py"))

    def of_script() -> list[str]:
        return [key for key in multiprocessing.spawn.get_preparation_data("x") if "init_main" in key]

    assert of_script()
    with api._without_main_module():
        assert not of_script()
    assert of_script() and of_main["__file__"] == str(tmp_path / "script.py")


def test_the_packages_named_like_functions_are_callable():
    import dinov2_custom.embed
    import dinov2_custom.export  # noqa: F401

    assert isinstance(d.embed, ModuleType)
    with pytest.raises(ConfigError, match="one image_size"):
        d.embed("out", "images", format="parquet")
    with pytest.raises(ConfigError, match="invalid choice"):
        d.export("out", "nothing")
    assert set(d.__all__) <= set(dir(d))
    with pytest.raises(AttributeError, match="nothing"):
        d.nothing  # noqa: B018


def test_the_loop_of_the_page_trains(images, capsys):
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    code = next(block for block in blocks if "SSLMetaArch" in block)
    short = [f"{key}={value}" for key, value in SHORT.items()]
    given = f'"train.dataset_path={images}", *{short!r}'
    exec(compile(code.replace('"train.dataset_path=/my/images"', given), PAGE, "exec"), {"__name__": "page"})
    assert len(capsys.readouterr().out.splitlines()) == 2
    assert d.load("own").image_size == 16


def test_a_notebook_has_tqdms_bar(monkeypatch):
    from dinov2_custom.logging.progress import ProgressBar, notebook_display

    assert notebook_display() is None
    shell = SimpleNamespace(config={"IPKernelApp": {}})
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: shell, display="shown"))
    assert notebook_display() == "shown"
    with ProgressBar(3) as bar:
        assert bar.visible
