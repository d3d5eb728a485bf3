"""Every command that the pages show can be given: its files, modules, flags, keys and values exist."""

import importlib.util
import re

import pytest

from dinov2_custom.cli import COMMANDS
from dinov2_custom.configs.load import load_run_config
from dinov2_custom.errors import DINOv2Error
from dinov2_custom.run.args import get_args_parser
from tests.docs.pages import REPOSITORY, Shown, commands

SCRIPTS = {one.script: name for name, one in COMMANDS.items()}
SHOWN = commands()


def complaint(shown: Shown) -> str:
    """Return why a command cannot be given as shown, or ""."""
    program, *rest = shown.words
    check = {"python": _python, "torchrun": _torchrun, "make": _make, "pip": _pip, "dinov2-custom": _own}.get(program)
    return check(rest) if check else ""


def _python(words: list[str]) -> str:
    if words[:1] != ["-m"]:
        return _script(words)
    if len(words) == 1 or words[1].split(".")[0] not in ("dinov2_custom", "benchmarks", "tests"):
        return ""
    if words[1] == "dinov2_custom":
        return _own(words[2:])
    return "" if importlib.util.find_spec(words[1]) else f"no module {words[1]}"


def _torchrun(words: list[str]) -> str:
    scripts = [i for i, word in enumerate(words) if word in SCRIPTS]
    return _script(words[scripts[0] :]) if scripts else ""


def _script(words: list[str]) -> str:
    name = SCRIPTS.get(words[0])
    if name is None:
        is_upstreams = words[0].startswith("dinov2/") or words[0].endswith("...")
        return "" if is_upstreams else f"no command {words[0]}"
    return _own([name, *words[1:]])


def _own(words: list[str]) -> str:
    if not words or words[0].startswith("-"):
        return ""
    name, *arguments = words
    if name not in COMMANDS:
        return f"no command {name}"
    if not arguments:
        return ""
    args = _parser(COMMANDS[name]).parse_args(arguments)
    if name in ("train", "plan") and not args.config_file.startswith("dinov2"):
        load_run_config(args.config_file, args.opts or [], "unused", require_dataset=False)
    return ""


def _parser(command):
    if command.parser is not None:
        return command.parser()
    main = importlib.import_module(f"dinov2_custom.{command.module}").main
    return get_args_parser(parents=[main.__self__.get_parser(add_help=False)])


def _make(words: list[str]) -> str:
    return "" if re.search(rf"^{words[0]}:", (REPOSITORY / "Makefile").read_text(), re.MULTILINE) else "no such target"


def _pip(words: list[str]) -> str:
    """Check that the extras of this package exist."""
    known = re.findall(r"^(\w+) = \[", (REPOSITORY / "pyproject.toml").read_text(), re.MULTILINE)
    lists = re.findall(r"(?:(?<!\S)\.|dinov2_custom)\[([\w,]+)\]", " ".join(words))
    asked = [extra for names in lists for extra in names.split(",")]
    return ", ".join(f"no extra {extra}" for extra in asked if extra not in known)


def test_every_command_can_be_given(monkeypatch, capsys):
    monkeypatch.chdir(REPOSITORY)
    bad = []
    for shown in SHOWN:
        try:
            reason = complaint(shown)
        except SystemExit:
            reason = capsys.readouterr().err  # none after --help
        except DINOv2Error as e:
            reason = str(e)
        if reason:
            bad.append(f"{shown}\n  {reason}")
    assert not bad, "\n".join(bad)
    assert len(SHOWN) > 80 and len({shown.page for shown in SHOWN}) > 15


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("python run/train/trian.py", "no command"),
        ("python run/embed.py out /my/images --formats npy", "--formats: unknown flag"),
        ("python run/train/train.py --config-file configs/vits.yaml optim.epoch=3", "optim.epochs"),
        ("python run/train/train.py --config-file configs/vitx.yaml optim.epochs=3", "configs/vitx.yaml"),
        ("python -m benchmarks.nothing", "no module"),
        ("make benches", "no such target"),
        ("pip install -e .[nothing]", "no extra nothing"),
    ],
)
def test_a_wrong_command_is_found(line, reason, monkeypatch, capsys):
    monkeypatch.chdir(REPOSITORY)
    try:
        found = complaint(Shown("page", line.split(), True))
    except SystemExit:
        found = capsys.readouterr().err
    except DINOv2Error as e:
        found = str(e)
    assert reason in found
