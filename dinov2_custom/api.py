"""The commands as functions: ``import dinov2_custom as d; run = d.pretrain("/images", out="out")``.

Every function builds the arguments of its command and calls what the command calls. Keyword arguments beyond the named
ones are the command's flags with underscores: ``batch_size=32`` is ``--batch-size 32``, ``overwrite=True`` is
``--overwrite``, a list is several values; False and None leave a flag out. Configuration keys are dotted and therefore
in a mapping, ``overrides={"optim.epochs": 5}``.

Errors are :class:`dinov2_custom.errors.DINOv2Error`. Data-loading processes do not import the caller's script, which
needs no ``if __name__ == "__main__"``.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import importlib
import io
import json
import logging
import os
import sys
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from dinov2_custom import cli
from dinov2_custom.configs.checks import suggest_key
from dinov2_custom.errors import CONSOLE_SCRIPT, DONE, ConfigError, DINOv2Error, LaunchError, stopped_by
from dinov2_custom.logging import remove_logging
from dinov2_custom.logging.progress import notebook_display
from dinov2_custom.plots.metrics_file import METRICS_FILE, read_metrics
from dinov2_custom.run.submit import submit_jobs
from dinov2_custom.utils.run_folder import default_output

if TYPE_CHECKING:
    import numpy as np
    from omegaconf import DictConfig

    from dinov2_custom.models.vision_transformer import DinoVisionTransformer

StrPath = str | os.PathLike
_SIGINT = stopped_by(2)
_KNN_FILE = "results_eval_knn.json"
_running = threading.Lock()  # held during a call: logging, process group and sys.argv are those of the process


class Run:
    """A training run, finished or not: its directory ``out`` and what it contains."""

    def __init__(self, out: StrPath) -> None:
        self.out = Path(out).expanduser().absolute()

    def __repr__(self) -> str:
        return f"Run({str(self.out)!r})"

    def __fspath__(self) -> str:
        return str(self.out)

    @property
    def config(self) -> DictConfig:
        """The complete configuration, config.yaml.

        Raises:
            ConfigError: the directory has none.
        """
        from omegaconf import OmegaConf

        from dinov2_custom.configs.load import read_config

        return OmegaConf.create(read_config(self.out / "config.yaml", "give the directory of a training"))

    @property
    def metrics(self) -> Any:
        """The rows of training_metrics.json: a pandas DataFrame if pandas is installed, else a list of dicts.

        Raises:
            DataError: there are no rows.
        """
        rows = read_metrics(self.out / METRICS_FILE)
        try:
            pandas = importlib.import_module("pandas")
        except ImportError:
            return rows
        return pandas.DataFrame(rows)

    def teacher(self) -> DinoVisionTransformer:
        """Return the newest teacher, see :func:`load`."""
        return load(self.out)

    def plot(self) -> Path:
        """Write history.png and history.html into the run directory; return the first's path, shown in a notebook.

        Also while the run is training.

        Raises:
            DataError: there are no metrics.
            ConfigError: matplotlib is missing.
        """
        history = importlib.import_module("dinov2_custom.plots.history")
        history.main(cli.history_parser().parse_args([str(self.out)]))
        path = self.out / "history.png"
        if display := notebook_display():
            display.display(display.Image(filename=str(path)))
        return path

    def resume(self, overrides: Mapping[str, Any] | None = None, **flags: Any) -> Run:
        """Continue from the newest checkpoint with the run's own configuration, changed by ``overrides``.

        A finished run continues if ``overrides`` makes it longer: ``{"optim.epochs": 200}``. Raises what
        :func:`pretrain` raises.
        """
        opts = _opts(overrides)
        _ = self.config  # must exist
        _call("train", opts, {"config_file": self.out / "config.yaml", "output_dir": self.out}, flags)
        return self


class Embedding(NamedTuple):
    """Features of a dataset.

    Attributes:
        features: (N, D); float32 unless ``save_dtype`` was given.
        rows: one dict per row of ``features``, with ``path`` and, for labelled datasets, ``label``.
        folder: where both are.
    """

    features: np.ndarray
    rows: list[dict[str, Any]]
    folder: Path


def pretrain(
    images: StrPath | Sequence[StrPath],
    out: StrPath,
    *,
    config: StrPath = "vits.yaml",
    arch: str = "",
    overrides: Mapping[str, Any] | None = None,
    **flags: Any,
) -> Run:
    """Train on unlabeled images, or continue the run in ``out``, and return the run.

    This is ``dinov2-custom train``: one process per GPU of this machine, log lines or a progress bar, all files in
    ``out``. Ctrl-C, or a notebook's stop button, saves after the current step and raises KeyboardInterrupt; the same
    call, or ``Run(out).resume()``, continues.

    Args:
        images: folder, several folders, or a dataset string, as for ``train.dataset_path``.
        out: run directory; "" for outputs/<date>_<time>.
        config: YAML file, or the name of a recipe; "" for the defaults.
        arch: ``student.arch``, such as "vit_small"; "" for that of ``config``.
        overrides: dotted keys of the configuration and their values, such as ``{"optim.epochs": 5}``.
        flags: further flags of the command, such as ``no_resume=True`` or ``ngpus=2``.

    Raises:
        DINOv2Error: bad configuration, data or checkpoint, or the run ended early.
        KeyboardInterrupt: after saving, see above.
    """
    chosen: dict[str, Any] = {"train.dataset_path": images} | ({"student.arch": arch} if arch else {})
    opts = [*_opts(chosen), *_opts(overrides)]
    args = _call("train", opts, {"config_file": config or None, "output_dir": out or None}, flags)
    return Run(args.output_dir)


def load(source: Run | StrPath) -> DinoVisionTransformer:
    """Return the teacher's backbone of a run or an export, of any architecture, frozen and in evaluation mode.

    Args:
        source: run directory (its newest teacher), weight file, URL, or folder of transformers or timm.

    Three attributes describe its images: ``image_size`` (pixels), ``normalize`` (``{"mean": ..., "std": ...}`` for
    values in 0..1) and ``preprocess``, a function from a PIL image to a normalised tensor (3, image_size, image_size).

    Raises:
        CheckpointError: the weights are missing, unreadable, or of another architecture.
        ConfigError: the configuration beside them cannot be read.
    """
    from dinov2_custom.data.transforms import make_central_crop_transform
    from dinov2_custom.teacher import load_teacher

    with _random_state():
        teacher = load_teacher(os.fspath(source))
    backbone, size = teacher.backbone, teacher.image_size
    backbone.image_size, backbone.normalize = size, teacher.normalize
    backbone.preprocess = make_central_crop_transform(size, **teacher.normalize)
    return backbone


def embed(source: Run | StrPath, images: StrPath | Sequence[StrPath], out: StrPath = "", **flags: Any) -> Embedding:
    """Compute the features of all images; return them with their file names.

    This is ``dinov2-custom embed``: a second call with the same arguments reads the result of the first.

    Args:
        source: as for :func:`load`.
        images: folder, several folders, or a dataset string.
        out: folder of the result; "" for outputs/embed/<name of the run>.
        flags: of the command, such as ``features="cls+mean"`` or ``batch_size=256``; one ``image_size``, and not
            ``format``.

    Raises:
        DINOv2Error: bad arguments, weights or data.
    """
    import numpy as np

    if isinstance(flags.get("image_size"), Sequence) or "format" in flags:
        given = {name: flags[name] for name in ("image_size", "format") if name in flags}
        raise ConfigError(
            f"embed: expected one image_size and no format, got {given}; for several sizes or Parquet, use the command "
            f"`{CONSOLE_SCRIPT} embed`"
        )
    folder = Path(out or default_output("embed", os.fspath(source))).expanduser()
    _call("embed", [os.fspath(source), _dataset(images)], {"output_dir": folder}, flags)
    rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text(encoding="utf-8").splitlines()]
    return Embedding(np.load(folder / "features.npy", mmap_mode="r"), rows, folder)


def knn(source: Run | StrPath, train: StrPath, val: StrPath, out: StrPath = "", **flags: Any) -> dict[str, float]:
    """Classify the images of ``val`` by their nearest neighbours in ``train``; return accuracies in per cent.

    This is ``dinov2-custom knn``.

    Args:
        source: a run, or a weight file of one.
        train, val: folder with one folder per class, or a dataset string with labels.
        out: folder of the results; "" for outputs/<date>_<time>.
        flags: of the command, such as ``nb_knn=[10, 20]``.

    Returns:
        ``{"('full', 10) Top 1": percent, ...}``.

    Raises:
        DINOv2Error: bad arguments, weights or data.
    """
    given: dict[str, Any] = {"pretrained_weights": os.fspath(source), "output_dir": out or None}
    for name, data in (("train", train), ("val", val)):
        given[f"{name}_dataset"] = (
            f'LabelledFolder:root="{os.fspath(data)}"' if Path(data).expanduser().is_dir() else data
        )
    file = Path(out).expanduser() / _KNN_FILE
    earlier = len(file.read_bytes()) if out and file.is_file() else 0  # the command appends
    args = _call("knn", [], given, flags)
    results: dict[str, float] = {}
    for line in (Path(args.output_dir) / _KNN_FILE).read_bytes()[earlier:].splitlines():
        results |= json.loads(line)
    return results


def export(source: Run | StrPath, to: str, output: StrPath = "", **flags: Any) -> Path:
    """Write the backbone for another library, compare the features there, and return the path.

    This is ``dinov2-custom export``.

    Args:
        source: as for :func:`load`.
        to: "hf", "timm", "torch", "safetensors", "onnx" or "rf-detr".
        output: file or folder; "" for outputs/export/<name of the run>_<to>.
        flags: of the command, such as ``overwrite=True``.

    Raises:
        DINOv2Error: bad arguments or weights, or the other library does not reproduce the features.
    """
    from dinov2_custom.export.main import default_path

    args = _call("export", [os.fspath(source)], {"to": to, "output": output or None}, flags)
    return Path(args.output).expanduser() if args.output else default_path(args.source, args.to)


# from keyword arguments to a command


def _call(command: str, words: Sequence[str], given: Mapping[str, Any], flags: Mapping[str, Any]) -> argparse.Namespace:
    """Run ``command`` in this process and return its parsed arguments, completed.

    Args:
        words: positional arguments.
        given: flags that the function sets; None leaves one out.
        flags: further flags, of the caller.

    Raises:
        DINOv2Error: also for an exit code other than 0, which it has as ``exit_code``.
        KeyboardInterrupt: it was interrupted, or saved and ended after an interrupt.
    """
    chosen = cli.COMMANDS[command]
    module = importlib.import_module(f"{cli.__package__}.{chosen.module}")
    task = module.main.__self__ if chosen.parser is None else None  # a launched one's main is a method of its Task
    parser = task.parser() if task else chosen.parser()
    arguments = [*words, *_arguments(command, parser, given, flags)]
    args = _parse(parser, arguments)
    main = partial(submit_jobs, task, args, task.name) if task else partial(module.main, args)
    if not _running.acquire(blocking=False):
        raise LaunchError(
            f"{command}: expected one call at a time in a process, got another that is still running in a thread; wait "
            "for it, or use another process"
        )
    try:
        with _of_the_command([CONSOLE_SCRIPT, command, *arguments]), _random_state(), _without_main_module():
            code = main()
    finally:
        _running.release()
    if code == _SIGINT:
        raise KeyboardInterrupt(f"{command}: stopped and saved; the same call continues")
    if code != DONE:
        error = DINOv2Error(f"{command}: expected it to finish, got exit code {code}; see the messages above")
        error.exit_code = code
        raise error
    return args


@contextlib.contextmanager
def _of_the_command(words: list[str]) -> Iterator[None]:
    """Make ``words`` the command line, which the log gives, and remove the command's logging at the end."""
    typed, level = sys.argv, logging.getLogger("dinov2").level
    captured = getattr(warnings.showwarning, "__module__", "") == logging.__name__
    try:
        sys.argv = words
        yield
    finally:
        sys.argv = typed
        remove_logging("dinov2")
        logging.getLogger("dinov2").setLevel(level)
        logging.captureWarnings(captured)


@contextlib.contextmanager
def _random_state() -> Iterator[None]:
    """Restore the state of the caller's random numbers; building a model draws some.

    Torch is not imported for this, because commands set the variables that it reads at import.
    """
    torch = sys.modules.get("torch")
    state = torch.get_rng_state() if torch else None
    of_gpus = torch.cuda.get_rng_state_all() if torch and torch.cuda.is_initialized() else []
    try:
        yield
    finally:
        if torch:
            torch.set_rng_state(state)
        if of_gpus:
            torch.cuda.set_rng_state_all(of_gpus)


def _parse(parser: argparse.ArgumentParser, arguments: list[str]) -> argparse.Namespace:
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return parser.parse_args(arguments)
    except SystemExit as e:
        text = said.getvalue().strip().removeprefix("error: ").partition("\nhelp: ")[0]
        raise ConfigError(text) from e


def _arguments(
    command: str, parser: argparse.ArgumentParser, given: Mapping[str, Any], flags: Mapping[str, Any]
) -> Iterator[str]:
    known: dict[str, str] = {}
    for flag in parser._option_string_actions:
        if flag.startswith("--") and not flag.startswith("--help"):  # these end a program
            known.setdefault(flag.lstrip("-").replace("-", "_"), flag)  # the first of two spellings
    dests = {name: parser._option_string_actions[flag].dest for name, flag in known.items()}
    set_already = {dests[name] for name, value in given.items() if value is not None}
    for name in flags:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            key = suggest_key(name)
            advice = f"did you mean {near[0]}?" if near else "configuration keys are given as overrides={'key': value}"
            if command == "train" and key and not near:
                advice = f"a configuration key is given as overrides={{'key': value}}; {key}"
            raise ConfigError(f"{command}: expected a flag of the command, got {name}; {advice}")
        if dests[name] in set_already:
            raise ConfigError(f"{command}: expected {name} from the function's own argument, got it as a flag too")
    for name, value in {**given, **flags}.items():
        value = _plain(value)
        if value is None or value is False:
            continue
        if value is True:
            yield known[name]
        elif isinstance(value, list | tuple):
            yield from (known[name], *map(_text, value))
        else:
            yield f"{known[name]}={_text(value)}"


def _opts(overrides: Mapping[str, Any] | None) -> list[str]:
    """Return ``key=value`` for each item; JSON is YAML, and quotes keep text as it is."""
    if not isinstance(overrides, Mapping | None):
        raise ConfigError(f"overrides: expected a mapping such as {{'optim.epochs': 5}}, got {overrides!r}")
    return [
        f"{key}={json.dumps(value, ensure_ascii=False, default=_json)}" for key, value in (overrides or {}).items()
    ]


def _dataset(images: StrPath | Sequence[StrPath]) -> str:
    """Return the dataset string of a folder, several folders, or of a dataset string itself."""
    if isinstance(images, list | tuple):
        return "ImageDataset" + "".join(f':root="{os.fspath(folder)}"' for folder in images)
    return os.fspath(images)


def _plain(value: Any) -> Any:
    """Return a value of Python's own types for one of numpy, torch or pathlib."""
    if hasattr(value, "tolist"):
        return value.tolist()
    return list(value) if isinstance(value, range) else _text(value) if isinstance(value, os.PathLike) else value


def _json(value: Any) -> Any:
    """Return what ``json`` writes for a value that it does not know; that of other types is refused by their keys."""
    plain = _plain(value)
    return str(value) if plain is value else plain


def _text(value: Any) -> str:
    return os.fspath(value) if isinstance(value, os.PathLike) else str(value)


@contextlib.contextmanager
def _without_main_module() -> Iterator[None]:
    """Hide where the caller's script is from processes that are spawned in the body.

    multiprocessing would import it into each of them, where a script without ``if __name__ == "__main__"`` would start
    the training once more. What these processes receive is of this package alone.
    """
    of_main = vars(sys.modules["__main__"])
    hidden = {name: of_main.pop(name) for name in ("__file__", "__spec__") if name in of_main}
    of_main["__spec__"] = None  # as in a notebook, where multiprocessing finds neither
    try:
        yield
    finally:
        of_main.pop("__spec__")
        of_main.update(hidden)
