# PYTHON_ARGCOMPLETE_OK
"""The commands of the package: their flags, the modules that implement them, and their exit codes. Torch-free.

:data:`COMMANDS` lists them; :func:`main` runs one, for the scripts in ``run/``, ``dinov2-custom`` and
``python -m dinov2_custom``.
"""

from __future__ import annotations

import argparse
import difflib
import math
import os
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, NoReturn

from dinov2_custom import __version__, entry
from dinov2_custom.errors import ERROR, USAGE, command, command_name, list_of_keys, small_recipe

AUTO = "auto"
COMPLETING = "_ARGCOMPLETE"  # set by argcomplete's shell functions: 1 + the words before the program's name
FEATURES = ("cls", "mean", "cls+mean")
EXPORT_FORMATS = {
    "hf": "folder for transformers: AutoModel.from_pretrained, AutoImageProcessor.from_pretrained",
    "timm": "folder for timm: timm.create_model('local-dir:<folder>', pretrained=True)",
    "torch": "one .pth in the layout of the released DINOv2 weights",
    "safetensors": "the same tensors as one .safetensors",
    "onnx": "one .onnx for any batch size: image -> cls_token, patch_tokens",
    "rf-detr": "folder for transformers: RfDetrForObjectDetection.from_pretrained; decoder and heads are new",
}
_RECIPE = "or the name of a recipe such as vits.yaml"
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def nearest(name: str, known: Sequence[str]) -> str:
    """Return what ``name`` probably means: the one of ``known`` that it abbreviates, else the most similar; or ""."""
    longer = [one for one in known if len(name.strip("-")) > 1 and one.startswith(name)]
    return next(iter(longer or difflib.get_close_matches(name, known, n=1, cutoff=0.65)), "")


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that reports a mistake and how to get help, instead of printing all its flags.

    Abbreviated flags are not accepted.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("allow_abbrev", False)
        spec = getattr(sys.modules["__main__"], "__spec__", None)
        if spec is not None and spec.name.startswith(f"{__package__}."):  # argparse shows this from Python 3.14 on
            kwargs.setdefault("prog", f"python -m {spec.name}")
        super().__init__(*args, **kwargs)

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse as argparse does, or answer the shell's request for completions and exit."""
        if COMPLETING in os.environ:
            import argcomplete  # of the extra [completion]; without it, no shell makes such requests

            argcomplete.autocomplete(self, print_suppressed=True)
        return super().parse_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        """Print ``message`` with the nearest flag, and how to get help; exit with 2, as argparse does."""
        unknown = [word.partition("=")[0] for word in message.split() if word.startswith("--")]
        near = ""
        if message.startswith("unrecognized arguments") and unknown:
            flags = self._option_string_actions
            # without second spellings
            near = nearest(unknown[0], [f for f in flags if "_" not in f or f.replace("_", "-") not in flags])
        elif chosen := re.search(r"invalid choice: '(.+?)' \(choose from (.*)\)", message):
            near = nearest(chosen[1], re.findall(r"[\w.+-]+", chosen[2]))
        message += f" -> did you mean {near}?" if near else ""
        print(f"error: {message}\nhelp: {self.prog} --help", file=sys.stderr)
        raise SystemExit(USAGE)


class OverridesParser(Parser):
    """A Parser whose positional ``opts``, key=value, may precede, separate or follow the flags.

    Arguments that are neither a flag nor key=value cause a single error that names them all. A parser created with
    parents=[...] must also be of this class.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(*args, **kwargs)

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """Parse as argparse does, then move the remaining overrides to ``opts``, in order."""
        namespace, left = super().parse_known_args(args, namespace)
        unknown = [text for text in left if text.startswith("-") and text != "--"]
        if hasattr(namespace, "opts"):
            overrides = [text for text in left if not text.startswith("-")]
            namespace.opts = [*(namespace.opts or []), *overrides]
            left = unknown
        return namespace, left

    def parse_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> argparse.Namespace:
        """Parse and check; print all mistakes, if any, and exit with status 2."""
        if COMPLETING in os.environ:
            super().parse_args(args, namespace)
        arguments = list(sys.argv[1:] if args is None else args)
        namespace, unknown = self.parse_known_args(arguments, namespace)
        problems = [self._explain_flag(text) for text in unknown]
        bad = [text for text in getattr(namespace, "opts", []) if "=" not in text or text.startswith("=")]
        bare = [flag for flag in unknown if "=" not in flag]
        their_values = {after for flag, after in zip(arguments, arguments[1:], strict=False) if flag in bare}
        problems += [self._explain_override(text) for text in bad if text not in their_values]
        if problems:
            self.error("\n  ".join(["cannot understand these arguments:", *problems]))
        if getattr(namespace, "eval", ""):
            print(f"{self.prog}: note: --eval is accepted for compatibility with upstream and ignored", file=sys.stderr)
        return namespace

    def _explain_flag(self, text: str) -> str:
        flag = text.split("=", 1)[0]
        if "." in flag:
            return f"{text}: expected a flag -> an override is written without dashes: {text.lstrip('-')}"
        flags = [name.lstrip("-") for action in self._actions for name in action.option_strings]
        near = nearest(flag.lstrip("-"), [name for name in flags if len(name) > 1])
        return f"{text}: unknown flag -> " + (f"did you mean --{near}?" if near else "--help lists the flags")

    def _explain_override(self, text: str) -> str:
        from dinov2_custom.configs.checks import explain_bad_override

        opts = next(action for action in self._actions if action.dest == "opts")
        schema = [opts.schema()] if hasattr(opts, "schema") else []  # of another command than training
        return f"{text}: expected key=value -> {explain_bad_override(text, *schema)}"


# flags shared by several programs


def add_output_dir(parser: argparse.ArgumentParser, help: str, **options: Any) -> None:
    """Add ``--output-dir``, also in upstream's spelling."""
    parser.add_argument("--output-dir", "--output_dir", metavar="DIR", help=help, **{"default": "", **options})


def add_configuration(
    parser: argparse.ArgumentParser, file_help: str = "configuration of the model, instead of the run's config.yaml"
) -> None:
    """Add ``--config-file``, ``--opts`` and ``--allow-unknown-keys``."""
    parser.add_argument("--config-file", default="", metavar="FILE", help=file_help)
    parser.add_argument("--opts", nargs="+", default=[], metavar="key=value", help="overrides of the configuration")
    _add_allow_unknown_keys(parser)


def _add_allow_unknown_keys(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--allow-unknown-keys", action="store_true", help="warn about unknown configuration keys instead of refusing"
    )


def add_workers(parser: argparse.ArgumentParser) -> None:
    """Add ``--num-workers``."""
    parser.add_argument(
        "--num-workers",
        type=number_or_auto,
        default=AUTO,
        help="data-loading processes; 0: in the main process; auto: one per core that this process may use, at most 16",
    )


def _add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, mps; auto: a GPU if there is one")


def _teacher_parser(
    description: str,
    checkpoint: str = "checkpoint",
    formatter_class: type[argparse.HelpFormatter] = argparse.ArgumentDefaultsHelpFormatter,
    add_help: bool = True,
) -> Parser:
    """Return a parser with the positional ``checkpoint``, a run directory or weight file."""
    parser = Parser(description=description, formatter_class=formatter_class, add_help=add_help)
    parser.add_argument(checkpoint, metavar="RUN|CHECKPOINT", help="run directory (its newest teacher) or weight file")
    return parser


# values of flags


def number_or_auto(text: str) -> int | str:
    """Parse a non-negative integer, or ``auto``."""
    if text != AUTO and not text.isdecimal():
        raise argparse.ArgumentTypeError(f"expected a whole number or {AUTO}, got {text!r}")
    return text if text == AUTO else int(text)


def _whole(least: int, most: int = 1 << 30) -> Callable[[str], int]:
    """Return a parser for integers in [least, most]."""

    def parse(text: str) -> int:
        if not text.isdecimal() or not least <= int(text) <= most:
            raise argparse.ArgumentTypeError(f"expected a whole number from {least} to {most}, got {text!r}")
        return int(text)

    return parse


def _above_zero(most: float = 1e12) -> Callable[[str], float]:
    """Return a parser for numbers in (0, most]."""

    def parse(text: str) -> float:
        try:
            number = float(text)
        except ValueError:
            number = math.nan
        if not 0 < number <= most:
            raise argparse.ArgumentTypeError(f"expected a number above 0 and up to {most:,.0f}, got {text!r}")
        return number

    return parse


def _num_bytes(text: str) -> int:
    """Parse a size in bytes: 500MB, 1GB, 1.5GB, 0."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?B)?", text.strip().upper())
    if match is None:
        raise argparse.ArgumentTypeError(f"expected a size such as 500MB or 1GB, got {text!r}")
    return int(float(match[1]) * _UNITS[match[2] or ""])


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def given_flags(parser: argparse.ArgumentParser, args: argparse.Namespace) -> dict[str, str]:
    """Return dest -> flag of the flags whose value in ``args`` is not the default."""
    return {
        action.dest: action.option_strings[0]
        for action in parser._actions
        if action.option_strings and hasattr(args, action.dest) and getattr(args, action.dest) != action.default
    }


# the programs, without the launcher's flags; with ``add_help=False`` a parser can be used as a parent of others


def train_parser(add_help: bool = True) -> OverridesParser:
    train = f"{command('run/train/train.py')} {small_recipe()}"
    parser = OverridesParser(
        description="Train DINOv2 on a folder of unlabeled images.",
        epilog=f"""\
examples:
  train a ViT-S on your own images:
    {train} --output-dir out train.dataset_path=/my/images
  a short run on a CPU, continued if the output directory has a checkpoint:
    {train} train.dataset_path=/my/images --output-dir out \\
        optim.epochs=2 optim.warmup_epochs=0.2 optim.freeze_last_layer_epochs=0 train.batch_size_per_gpu=8

all keys: {list_of_keys()}
""",
        add_help=add_help,
    )
    _add_overrides(parser, "optim.epochs=10, anywhere")
    add_output_dir(parser, "directory of the run (default: train.output_dir, else ./outputs/<date>_<time>)")
    parser.add_argument(
        "--no-resume",
        action="store_true",
        help="start over, even if the output directory has a checkpoint",
    )
    parser.add_argument(
        "--eval-only", action="store_true", help="write the teacher of the newest checkpoint, without training"
    )
    parser.add_argument("--eval", type=str, default="", metavar="STR", help="accepted as in upstream; ignored")
    return parser


def plan_parser() -> OverridesParser:
    plan = f"{command('run/train/plan.py')} {small_recipe()}"
    parser = OverridesParser(
        description="Print memory, time and price of a run before it starts; no GPU is needed.",
        epilog=f"""\
examples:
  which GPUs, how long, how much:
    {plan} --images 1000000 --arch s,b,l --gpus 1,8 --gpu A100-80GB,H100
  memory by category, and the largest batch for 24 GB:
    {plan} --fits 24
  seconds and memory of each combination, measured on this machine:
    {plan} --ablate precision=fp32,bf16 batch=2,8 --time
  the schedules of the run:
    {plan} --schedule --images 1000000
""",
    )
    _add_overrides(parser, "train.batch_size_per_gpu=32")
    add = parser.add_argument
    add("--arch", type=_words, default=[], metavar="A[,A]", help="s, b, l, g or names of student.arch, one row each")
    add("--batch", type=_positive, default=[], metavar="N[,N]", help="values of train.batch_size_per_gpu")
    add("--gpus", type=_positive, default=[1], metavar="N[,N]", help="total numbers of GPUs (default: 1)")
    add("--gpu", type=_words, default=[], metavar="GPU[,GPU]", help="kinds of GPUs, such as A100-80GB,L40S,4090")
    add("--images", type=_whole(1, 1 << 40), metavar="N", help="number of images, if an epoch is one pass over them")
    add("--price", type=_price, action="append", default=[], metavar="GPU=DOLLARS", help="$ per hour; may be repeated")
    add("--prices", default="", metavar="FILE", help="YAML file of prices, GPU: DOLLARS or [SPOT, ON DEMAND]")
    add("--time", action="store_true", help="time a few real steps on this machine")
    add("--memory", action="store_true", help="print the memory of a step by category instead of the table")
    add("--fits", type=_above_zero(), metavar="GB", help="as --memory, and the largest batch for so many GB")
    add(
        "--ablate",
        type=_axis,
        nargs="+",
        default=[],
        metavar="KEY=A,B",
        help="print time and memory of a step for each combination instead; KEY: arch, batch, precision or any key",
    )
    add("--schedule", action="store_true", help="print learning rate, weight decay, momentum, temperature instead")
    add_output_dir(parser, "folder for the figure of --schedule (default: the current folder)", default=".")
    return parser


def _words(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _positive(text: str) -> list[int]:
    return [_whole(1)(part) for part in _words(text)]


def _axis(text: str) -> tuple[str, list[str]]:
    """Parse KEY=A,B; commas inside brackets, as in KEY=[1,2],[3,4], belong to a value."""
    import yaml

    key, _, values = text.partition("=")
    listed = f"[{values}]"
    try:
        nodes = yaml.compose(listed, Loader=yaml.SafeLoader).value
    except yaml.YAMLError:
        nodes = []
    if not key or not nodes:
        raise argparse.ArgumentTypeError(f"expected KEY=VALUE,VALUE such as precision=fp32,bf16, got {text!r}")
    return key, [listed[node.start_mark.index : node.end_mark.index].strip() for node in nodes]


def _price(text: str) -> tuple[str, float]:
    name, _, value = text.partition("=")
    try:
        return name, _above_zero()(value)
    except argparse.ArgumentTypeError as e:
        raise argparse.ArgumentTypeError(f"expected GPU=DOLLARS such as H100=2.10, got {text!r}: {e}") from e


def _add_overrides(parser: OverridesParser, such_as: str) -> None:
    help_text = f"YAML file that overrides the defaults, {_RECIPE}"
    parser.add_argument("--config-file", default="", metavar="FILE", help=help_text)
    _add_allow_unknown_keys(parser)
    parser.add_argument("opts", nargs="*", default=[], metavar="key=value", help=f"overrides such as {such_as}")


def quickstart_parser() -> OverridesParser:
    parser = OverridesParser(
        description="Train DINOv2 for two minutes on tiles of real photographs and report what it has learned."
    )
    parser.add_argument(
        "--config-file",
        default="quickstart.yaml",
        metavar="FILE",
        help="configuration file, or the name of a recipe (default: %(default)s)",
    )
    add_output_dir(
        parser,
        "output directory; a finished run in it is evaluated again, not repeated (default: %(default)s)",
        default="outputs/quickstart",
    )
    parser.add_argument(
        "--seeds", type=_numbers, default=[0], metavar="N[,N]", help="train once for each seed (default: 0)"
    )
    parser.add_argument("--no-resume", action="store_true", help="train again, even if there is a finished run")
    _add_allow_unknown_keys(parser)
    parser.add_argument("opts", nargs="*", default=[], metavar="key=value", help="overrides of the recipe, anywhere")
    return parser


def verify_parser() -> Parser:
    parser = Parser(
        description="Decode every image of a dataset strictly; list the bad ones and write a clean list to train on.",
        epilog="exit codes: 0: all images are intact; 1: there are bad images or parts that cannot be listed; 2: the "
        "command could not be run",
    )
    _add_datasets(parser)
    add_output_dir(
        parser, "folder for the results; repeat the command to resume (default: ./outputs/verify_<dataset>_<hash>)"
    )
    parser.add_argument(
        "--workers", type=_whole(1), default=0, metavar="N", help="decoder processes (default: one for each core)"
    )
    return parser


def _add_datasets(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("dataset", nargs="+", help="as train.dataset_path: a folder, several folders, a dataset string")


def prepare_parser() -> Parser:
    parser = Parser(
        description="Check a dataset, shrink, convert or tile its images, and write tar shards or a folder.",
        epilog="exit codes: 0: done (bad images are left out and listed); 2: the command could not be run",
    )
    _add_datasets(parser)
    add_output_dir(
        parser,
        "folder for the shards: empty, or that of an interrupted run of the same command, which continues",
        default=None,
        required=True,
    )
    add = parser.add_argument
    add(
        "--short-side",
        type=_whole(1),
        default=0,
        metavar="PIXELS",
        help="shrink images whose shorter side is longer; 512 is a good value for photos (default: keep sizes)",
    )
    add(
        "--format",
        choices=("keep", "jpeg", "png"),
        default="keep",
        help="convert to this format; keep: as they are (default)",
    )
    add(
        "--quality",
        type=_whole(1, 100),
        default=90,
        metavar="1-100",
        help="quality of JPEG and WebP files that are written (default: 90)",
    )
    add(
        "--tile",
        type=_whole(1),
        default=0,
        metavar="PIXELS",
        help="cut images above --tile-above into squares of this size; they are not shrunk (default: no tiles)",
    )
    add(
        "--tile-above",
        type=_above_zero(),
        default=50.0,
        metavar="MEGAPIXELS",
        help="size from which --tile cuts (default: 50)",
    )
    add(
        "--shard-size",
        type=_num_bytes,
        default=10**9,
        metavar="SIZE",
        help="size of a tar file, such as 500MB; 0: a plain folder of files (default: 1GB)",
    )
    add(
        "--intensity",
        type=float,
        nargs=2,
        metavar=("LOW", "HIGH"),
        help="values that become 0 and 255 if images of more than 8 bits are changed, as data.intensity in training "
        "(default: measured on a sample of the dataset)",
    )
    add("--page", type=_whole(0), default=0, metavar="N", help="page to read from files with several (default: 0)")
    add("--workers", type=_whole(1), default=0, metavar="N", help="processes (default: one for each core)")
    return parser


def embed_parser(add_help: bool = True) -> Parser:
    parser = _teacher_parser(
        "Write the features of every image of a dataset. If interrupted, the same command resumes; several processes "
        "share the work.",
        add_help=add_help,
    )
    parser.add_argument("dataset", help="folder of images, or a dataset string as for training; labels are written too")
    add_output_dir(parser, "output directory (empty: ./outputs/embed/<name of the run>)")
    parser.add_argument(
        "--format", choices=("npy", "parquet"), default="npy", help="npy: features.npy, rows.jsonl; parquet: one file"
    )
    parser.add_argument(
        "--features",
        choices=FEATURES,
        default="cls",
        help="class token, mean of the patch tokens, or both, concatenated",
    )
    parser.add_argument("--l2", action="store_true", help="scale each row to length 1")
    parser.add_argument("--save-dtype", choices=("float32", "float16"), default="float32", help="of the file")
    parser.add_argument(
        "--image-size",
        type=int,
        nargs="+",
        default=[],
        metavar="PIXELS",
        help="side of the central square that the model sees, after the shorter side is resized to 256/224 of it; one "
        "folder for each of several sizes (default: that of the training, 224 for released weights)",
    )
    parser.add_argument("--batch-size", type=int, default=64, help="images per step")
    add_workers(parser)
    _add_device(parser)
    parser.add_argument(
        "--precision",
        choices=("auto", "fp32", "bf16", "fp16"),
        default="auto",
        help="number type that the model computes in; auto: bf16 on a GPU that has it, else fp32",
    )
    add_configuration(parser)
    parser.add_argument("--overwrite", action="store_true", help="replace features that are already there")
    return parser


def export_parser() -> Parser:
    formats = "\n".join(f"  {name:12} {text}" for name, text in EXPORT_FORMATS.items())
    parser = _teacher_parser(
        f"Write a trained backbone for another library, load it there and compare the features.\n\nformats:\n{formats}",
        "source",
        argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--to", required=True, choices=list(EXPORT_FORMATS), help="format, see above")
    parser.add_argument(
        "--output",
        "--output-dir",
        "--output_dir",
        default="",
        metavar="PATH",
        help="folder or file to write (default: ./outputs/export/<name of the run>_<format>)",
    )
    parser.add_argument(
        "--image-size",
        type=int,
        default=0,
        metavar="PIXELS",
        help="image size of the exported position embeddings, a multiple of the patch size (default: that of training)",
    )
    parser.add_argument(
        "--normalize",
        action="store_true",
        help="with --to onnx: put the normalization of images (0..1 -> mean 0, deviation 1) into the graph",
    )
    add_configuration(parser)
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier export at the output path")
    parser.add_argument(
        "--push",
        default="",
        metavar="USER/NAME",
        help="also upload the export and its model card to this repository of the Hugging Face Hub, which is created "
        "as private if it does not exist; the token is that of `hf auth login` or HF_TOKEN",
    )
    return parser


def history_parser() -> Parser:
    parser = Parser(
        description="Draw losses, schedules, entropies, gradient norms and throughput of a run, or of several to "
        "compare them, into history.png and history.html. Works at any time during training.",
    )
    parser.add_argument(
        "runs", nargs="+", metavar="RUN", help="output directory of a training, or a folder of such directories"
    )
    add_output_dir(
        parser,
        "folder for the two files (default: the run's directory; for several runs, the current folder)",
        default=None,
    )
    add = parser.add_argument
    add(
        "--forecast",
        type=_above_zero(1e6),
        metavar="EPOCHS",
        help="extrapolate a metric by so many epochs, as optim.epochs counts them, with a band",
    )
    add("--metric", metavar="KEY", help="to extrapolate (default: kNN, else RankMe, AP, mIoU, loss)")
    add("--gpu", default="", metavar="GPU", help="the GPU that ran, for the price, if the run's log does not name it")
    add("--price", type=_price, action="append", default=[], metavar="GPU=DOLLARS", help="$ per hour; may be repeated")
    return parser


def features_parser() -> Parser:
    parser = _teacher_parser(
        "Draw features of a trained backbone: pca.png (principal components of patch features), "
        "attention.png (attention of the class token) and scatter.png (one point per image, coloured by class if "
        "there is one folder per class)."
    )
    parser.add_argument("dataset", help="folder of images, or a dataset string")
    add_output_dir(parser, "folder for the figures (empty: ./outputs/features/<name of the run>)")
    parser.add_argument("--num-images", type=int, default=6, help="images in pca.png and attention.png")
    parser.add_argument("--num-points", type=int, default=1000, help="images in scatter.png; 0: do not draw it")
    parser.add_argument(
        "--image-size",
        type=int,
        default=0,
        metavar="PIXELS",
        help="shorter side in pca.png and attention.png, rounded to whole patches (0: that of the training)",
    )
    parser.add_argument("--heads", type=int, default=6, help="single heads shown in attention.png, besides the mean")
    _add_device(parser)
    add_configuration(parser)
    return parser


def decoder_train_parser(add_help: bool = True) -> OverridesParser:
    train = command("run/decoder/train.py")
    parser = OverridesParser(
        description="Train a detector or a segmenter on a pretrained backbone. The same command resumes.",
        epilog=f"""\
examples:
  boxes, fine-tuned with layer-wise decay of the learning rate:
    {train} --backbone out --task detection --train train.json --val val.json --output-dir detector
  a small GPU:
    {train} ... batch=2 accumulation=4 precision=bf16
  only the decoder, for 50 epochs:
    {train} ... frozen=true epochs=50
  does pretraining help? compare with the same decoder on a random backbone:
    {train} ... --compare-to random
""",
        add_help=add_help,
    )
    add = parser.add_argument
    opts_help = "settings such as lr=1e-4, anywhere; docs/decoder.md"
    opts = add("opts", nargs="*", default=[], metavar="key=value", help=opts_help)
    opts.schema = _decoder_settings  # for advice on mistakes, also in a parser with this one as a parent
    backbone = "run directory, weight file, name of released weights (dinov2_vitb14) or Hugging Face folder"
    add("--backbone", required=True, metavar="WEIGHTS", help=backbone)
    add(
        "--task",
        required=True,
        choices=("detection", "instance", "semantic"),
        help="boxes; masks of objects; a class per pixel",
    )
    add("--train", required=True, metavar="LABELS", help="COCO JSON, YOLO YAML, folder of masks or dataset definition")
    add("--val", required=True, metavar="LABELS", help="labels in the same forms, for validation after each epoch")
    add("--compare-to", default="", metavar="WEIGHTS", help="also train a decoder on this backbone, or `random`")
    add_output_dir(parser, "directory of the run", default=None, required=True)
    return parser


def _decoder_settings() -> type:
    from dinov2_custom.decoder.settings import Settings

    return Settings


def _decoder_parser(description: str) -> Parser:
    parser = Parser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("decoder", metavar="DECODER", help="output directory of the training, or its folder best")
    return parser


def decoder_eval_parser() -> Parser:
    parser = _decoder_parser("Print AP of boxes or masks, or IoU of classes, and write scores.json.")
    parser.add_argument("data", metavar="LABELS", help="labels, in the forms of --val in training")
    parser.add_argument("--part", default="val", help="part of a dataset definition: train, val or test")
    add_output_dir(parser, "folder for scores.json (empty: that of the decoder)")
    parser.add_argument("--batch-size", type=_whole(1), default=8, help="images per step")
    _add_device(parser)
    return parser


def decoder_predict_parser() -> Parser:
    parser = _decoder_parser("Find objects in a folder: predictions.json (COCO) or masks, and pictures.")
    parser.add_argument("images", metavar="FOLDER", help="folder of images")
    add_output_dir(parser, "folder for the results (empty: ./outputs/predict/<name of the folder>)")
    parser.add_argument("--threshold", type=float, default=0.3, help="lowest score of objects that are kept")
    parser.add_argument("--num-pictures", type=_whole(0), default=20, help="number of pictures to draw")
    parser.add_argument("--batch-size", type=_whole(1), default=8, help="images per step")
    _add_device(parser)
    return parser


def decoder_export_parser() -> Parser:
    parser = _decoder_parser("Write a trained decoder as ONNX for any batch size and compare it in onnxruntime.")
    parser.add_argument("--output", required=True, metavar="FILE", help="file to write, such as detector.onnx")
    parser.add_argument("--normalize", action="store_true", help="put the normalization of images into the graph")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier export")
    return parser


def patches_parser() -> Parser:
    parser = Parser(
        description="Apply this project's patches to a checkout of dinov2, remove them, or show which are applied. "
        "Each appends a marked block to the modules that it changes; no other line is modified.",
    )
    parser.add_argument("checkout", help="folder that contains the package dinov2")
    parser.add_argument("--only", default="", metavar="a,b", help="these patches instead of all of the series")
    parser.add_argument("--revert", action="store_true", help="remove the blocks, byte for byte")
    parser.add_argument("--status", action="store_true", help="show the state of each patch; change nothing")
    parser.add_argument("--diff", action="store_true", help="show what would change; change nothing")
    parser.add_argument(
        "--patches", default="", metavar="DIR", help="folder with the series (default: patches/ of this repository)"
    )
    return parser


class Command(NamedTuple):
    """A command.

    Attributes:
        script: its path in a checkout.
        module: its ``main(args)`` runs the command and returns the exit code.
        parser: creates the parser of ``args``; None for the launcher, whose ``main`` takes the raw arguments.
        does: one line of help text.
        error_code: exit code after a user-fixable error.
        quiet_threads: see :func:`entry.run`.
    """

    script: str
    module: str
    parser: Callable[[], argparse.ArgumentParser] | None
    does: str
    error_code: int = ERROR
    quiet_threads: bool = False


COMMANDS = {
    command_name(one.script): one
    for one in (
        Command("run/quickstart.py", "quickstart.main", quickstart_parser, "train on photographs", quiet_threads=True),
        Command("run/train/train.py", "run.train.train", None, "train, here or as a SLURM job"),
        Command("run/train/plan.py", "plan.main", plan_parser, "memory, time and price of a run, before it"),
        Command("run/data/verify.py", "verify.main", verify_parser, "decode every image, list the bad ones", USAGE),
        Command("run/data/prepare.py", "prepare.main", prepare_parser, "shrink, convert, tile, pack images", USAGE),
        Command("run/eval/knn.py", "run.eval.knn", None, "evaluate by nearest neighbours"),
        Command("run/eval/linear.py", "run.eval.linear", None, "evaluate by linear classifiers"),
        Command("run/eval/log_regression.py", "run.eval.log_regression", None, "evaluate by logistic regression"),
        Command("run/embed.py", "run.embed", None, "write the features of a dataset"),
        Command("run/export/export.py", "export.main", export_parser, "write a backbone for another library"),
        Command("run/plots/history.py", "plots.history", history_parser, "draw the metrics of runs"),
        Command("run/plots/features.py", "plots.look", features_parser, "draw features, attention", quiet_threads=True),
        Command("run/decoder/train.py", "run.decoder.train", None, "train a detector or segmenter"),
        Command("run/decoder/eval.py", "decoder.evaluate", decoder_eval_parser, "score a detector or segmenter"),
        Command("run/decoder/predict.py", "decoder.predict", decoder_predict_parser, "find objects in a folder"),
        Command("run/decoder/export.py", "decoder.export", decoder_export_parser, "write a detector as ONNX"),
        Command("run/patches/apply.py", "patching.main", patches_parser, "fix a checkout of dinov2"),
    )
}

ALIASES = {"plot": "history"}  # also accepted; command -> key of COMMANDS


def _command_before_cursor() -> str | None:
    """Return the command on the line that the shell is completing, from whose name on its parser completes it.

    None while the command itself is being typed.
    """
    from argcomplete.lexers import split_line

    words = split_line(os.environ["COMP_LINE"], int(os.environ["COMP_POINT"]))[3]
    number = int(os.environ[COMPLETING])  # of the words before the command
    name = words[number] if len(words) > number else ""
    if name not in COMMANDS and name not in ALIASES:
        return None
    os.environ[COMPLETING] = str(number + 1)
    return name


def main(name: str | None = None, arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command ``name`` and end this process with its exit code.

    Args:
        name: a key of ``COMMANDS``; None for the first of ``arguments``.
        arguments: command-line arguments; None for those of this process.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    if name is None and COMPLETING in os.environ:
        name = _command_before_cursor()
    if name is None:
        lines = "\n".join(f"  {key:16}{one.does}" for key, one in COMMANDS.items())
        lines += "".join(f"\n  {alias:16}the same as {key}" for alias, key in ALIASES.items())
        parser = Parser(
            prog=command("").rstrip(),
            usage="%(prog)s [-h] [--version] COMMAND ...",
            description="DINOv2 pretraining on your own unlabeled images.",
            epilog=f"commands, each with its own --help:\n{lines}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        parser.add_argument("--version", action="version", version=f"dinov2_custom {__version__}")
        parser.add_argument("command", choices=[*COMMANDS, *ALIASES], metavar="COMMAND", help="see below")
        if not words and COMPLETING not in os.environ:
            parser.print_help(sys.stderr)
            raise SystemExit(USAGE)
        name, words = parser.parse_args(words[:1]).command, words[1:]
    chosen = COMMANDS[ALIASES.get(name, name)]
    args: Any = words
    if chosen.parser is not None:
        parser = chosen.parser()
        parser.prog = command(chosen.script if name in COMMANDS else f"{name}.py")
        args = parser.parse_args(words)
    module = f"{__package__}.{chosen.module}"
    entry.leave(entry.run(module, args, error_code=chosen.error_code, quiet_threads=chosen.quiet_threads))
