"""The table of commands, flags and overrides; hints in a checkout and in an installed wheel."""

import os
import re
import shlex
import subprocess
import sys
import types
from pathlib import Path

import pytest

from dinov2_custom import cli, errors
from dinov2_custom.cli import COMMANDS, OverridesParser
from dinov2_custom.cli import train_parser as get_args_parser
from dinov2_custom.run.args import get_args_parser as get_launch_parser

REPOSITORY = Path(__file__).resolve().parents[1]
SHORT = ["train.OFFICIAL_EPOCH_LENGTH=2", "optim.epochs=1", "optim.warmup_epochs=0", "train.num_workers=0"]


def test_a_checkout_names_its_scripts(monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    scripts = {str(path.relative_to(REPOSITORY)) for path in (REPOSITORY / "run").rglob("*.py")}
    assert {one.script for one in COMMANDS.values()} == scripts
    assert all(errors.command(script) == f"python {script}" for script in scripts)
    assert "configs/vits.yaml" in errors.small_recipe()


def test_elsewhere_commands_of_the_package_are_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, one in COMMANDS.items():
        assert errors.command(one.script) == f"python -m dinov2_custom {name}"


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_that_names_what_can_be_typed_there(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="0"):
        cli.main(None, [name, "--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert said.startswith(f"usage: python -m dinov2_custom {name} ")
    assert "run/" not in said and "configs/vits" not in said


def test_the_commands_are_listed_and_a_wrong_one_is_named(capsys):
    with pytest.raises(SystemExit, match="0"):
        cli.main(None, ["--help"])
    listed = capsys.readouterr().out
    assert all(f"  {name:16}{one.does}\n" in listed for name, one in COMMANDS.items())
    for words in (["trian", "--output-dir", "x"], ["--output-dir", "x"]):
        with pytest.raises(SystemExit, match="2"):
            cli.main(None, words)
        lines = capsys.readouterr().err.splitlines()
        assert lines[0].startswith("error: ") and lines[-1] == "help: python -m dinov2_custom --help"
        assert lines[0].endswith("did you mean train?") == (words[0] == "trian")
    with pytest.raises(SystemExit, match="2"):
        cli.main(None, [])
    assert capsys.readouterr().err == listed


def test_a_command_ends_with_what_its_module_returns_or_with_its_code_for_errors(monkeypatch, capsys):
    def refuse(args):
        raise errors.DataError(f"no images in {args.dataset}")

    monkeypatch.setattr("dinov2_custom.verify.main.main", refuse)
    with pytest.raises(SystemExit, match="2"):
        cli.main("verify", ["a", "b"])
    assert capsys.readouterr().err == "error: no images in ['a', 'b']\n"
    monkeypatch.setattr("dinov2_custom.verify.main.main", lambda args: 1)
    with pytest.raises(SystemExit, match="1"):
        cli.main("verify", ["a"])


def test_modules_of_commands_are_not_silent_when_they_are_run():
    for name, one in COMMANDS.items():
        source = (REPOSITORY / "dinov2_custom" / f"{one.module.replace('.', '/')}.py").read_text()
        if name not in ("quickstart", "apply"):  # which only a checkout has
            assert source.endswith(f'if __name__ == "__main__":\n    cli.main("{name}")\n'), one.module


def test_readmes_trainings_have_a_directory_each():
    """Run them in order, as a reader would: a run of another architecture is rejected in the first one's directory."""
    blocks = re.findall(r"```\n(.*?)```", (REPOSITORY / "README.md").read_text(), flags=re.DOTALL)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    trainings = [shlex.split(line) for line in lines if line.startswith("python run/train/train.py ")]
    folders = [words[words.index("--output-dir") + 1] for words in trainings]
    assert len(folders) >= 3 and len(set(folders)) == len(folders)


@pytest.mark.parametrize("name", COMMANDS)
def test_a_wrong_flag_is_answered_in_two_lines(name, capsys, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    with pytest.raises(SystemExit, match="2"):
        cli.main(name, ["--no-such-flag"])
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("error: ") and lines[-1] == f"help: python {COMMANDS[name].script} --help"
    assert len(lines) <= 3


@pytest.mark.parametrize(
    "flag, said", [("--outdir=x", " -> did you mean --output-dir?"), ("--nothing-like-it", "")], ids=str
)
def test_a_misspelled_flag_is_answered_with_the_nearest(flag, said, capsys):
    parser = cli.verify_parser()
    with pytest.raises(SystemExit, match="2"):
        parser.parse_args(["/my/images", flag, "x"])
    first = capsys.readouterr().err.splitlines()[0]
    assert first == f"error: unrecognized arguments: {flag} x{said}"


# flags and overrides of a training


def parse(*arguments):
    return get_args_parser().parse_args(list(arguments))


def error_of(capsys, *arguments):
    with pytest.raises(SystemExit) as stop:
        parse(*arguments)
    assert stop.value.code == 2
    return capsys.readouterr().err


def test_defaults():
    assert vars(parse()) == {
        "config_file": "",
        "output_dir": "",
        "no_resume": False,
        "eval_only": False,
        "eval": "",
        "allow_unknown_keys": False,
        "opts": [],
    }


def test_flags_may_follow_overrides():
    args = parse("train.x=1", "--output-dir", "o")
    assert (args.output_dir, args.opts) == ("o", ["train.x=1"])


def test_any_order_keeps_the_order_of_overrides():
    args = parse("a.b=1", "--output_dir", "o", "c=x=y", "--no-resume", "d=-1", "e=", "--config-file=f", "a.b=2")
    assert args.opts == ["a.b=1", "c=x=y", "d=-1", "e=", "a.b=2"]
    assert (args.output_dir, args.no_resume, args.config_file) == ("o", True, "f")


def test_upstreams_documented_order():
    args = parse("--config-file", "f", "--no-resume", "train.dataset_path=ImageNet:split=TRAIN:root=/a b:extra=/c")
    assert args.opts == ["train.dataset_path=ImageNet:split=TRAIN:root=/a b:extra=/c"]


def test_calls_do_not_share_overrides():
    parser = get_args_parser()
    parser.parse_args(["a=1"])
    assert parser.parse_args([]).opts == []


def test_double_dash_is_allowed():
    assert parse("--no-resume", "--", "a=1", "b=2").opts == ["a=1", "b=2"]


def test_all_mistakes_are_named_at_once(capsys):
    text = error_of(capsys, "a=1", "--outptu-dir", "o", "--train.seed=1", "optim.epoch", "configs/x.yaml", "--zzz")
    assert "--outptu-dir: unknown flag -> did you mean --output-dir?" in text
    assert "--train.seed=1: expected a flag -> an override is written without dashes: train.seed=1" in text
    assert "optim.epoch: expected key=value -> did you mean optim.epochs=VALUE?" in text
    assert "for a config file write --config-file configs/x.yaml" in text
    assert "--zzz: unknown flag -> --help lists the flags" in text
    assert "  o:" not in text, "the value of an unknown flag is not a mistake of its own"


def test_only_a_flag_that_is_near_is_suggested(capsys):
    parser = get_launch_parser(parents=[get_args_parser(add_help=False)])
    for given, near in (
        ("--foo", ""),
        ("--out", "--output-dir"),
        ("--gpu", "--gpus"),
        ("--node=2", "--nodes"),
        ("--resume", "--no-resume"),
    ):
        with pytest.raises(SystemExit):
            parser.parse_args([given])
        error = capsys.readouterr().err
        assert f"{given}: unknown flag -> " + (f"did you mean {near}?" if near else "--help lists the flags") in error


def test_flags_are_not_abbreviated(capsys):
    assert "--config: unknown flag -> did you mean --config-file?" in error_of(capsys, "--config", "x")


def test_eval_is_reported_as_unused(capsys):
    assert parse("--eval", "knn").eval == "knn"
    assert "--eval is accepted" in capsys.readouterr().err
    parse("--eval-only")
    assert capsys.readouterr().err == ""


def test_it_serves_as_a_parent():
    parser = OverridesParser(parents=[get_args_parser(add_help=False)])
    parser.add_argument("--nodes", type=int, default=1)
    args = parser.parse_args(["a=1", "--nodes", "2", "b=2", "--output-dir", "o"])
    assert (args.nodes, args.opts, args.output_dir) == (2, ["a=1", "b=2"], "o")


def test_known_args_keep_foreign_arguments():
    args, unknown = get_args_parser().parse_known_args(["a=1", "--foo", "b=2"])
    assert (args.opts, unknown) == (["a=1", "b=2"], ["--foo"])


def test_help_has_every_flag_and_two_examples():
    text = get_args_parser().format_help()
    for flag in ("--config-file", "--output-dir", "--output_dir", "--no-resume", "--eval-only", "--allow-unknown-keys"):
        assert flag in text
    assert text.count("python run/train/train.py") == 2


def test_parsing_and_its_errors_need_neither_torch_nor_omegaconf():
    code = (
        "import sys\n"
        "from dinov2_custom.cli import train_parser\n"
        "try: train_parser().parse_args(['optim.epoch'])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'omegaconf', 'numpy', 'yaml'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stderr=subprocess.DEVNULL)


# the forms of a command, recipes by name, completion


@pytest.mark.parametrize("typed", ["/venv/bin/dinov2-custom", "-m"])
def test_usage_and_hints_name_the_form_that_was_typed(typed, monkeypatch, capsys):
    form = "dinov2-custom" if typed != "-m" else "python -m dinov2_custom"
    monkeypatch.chdir(REPOSITORY)
    monkeypatch.setattr("sys.argv", [typed])
    assert errors.command("run/eval/knn.py") == f"{form} knn"
    for name in ("train", "plot"):
        with pytest.raises(SystemExit, match="0"):
            cli.main(None, [name, "--help"])
        assert capsys.readouterr().out.startswith(f"usage: {form} {name} ")


def test_usage_of_a_module_of_the_package_names_it(monkeypatch):
    spec = types.SimpleNamespace(name="dinov2_custom.eval.knn")
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", spec)
    assert cli.embed_parser().prog == "python -m dinov2_custom.eval.knn"
    monkeypatch.setattr(spec, "name", "pytest.__main__")
    assert "pytest.__main__" not in cli.embed_parser().prog


def test_version(capsys):
    with pytest.raises(SystemExit, match="0"):
        cli.main(None, ["--version"])
    assert re.fullmatch(r"dinov2_custom \d+\.\d+\.\d+\n", capsys.readouterr().out)


def test_recipes_are_found_by_name(tmp_path, monkeypatch):
    from dinov2_custom.configs.load import find_config, load_run_config

    monkeypatch.chdir(tmp_path)
    assert find_config("vits.yaml") == REPOSITORY / "configs" / "vits.yaml"
    assert load_run_config("vitb.yaml", require_dataset=False).student.arch == "vit_base"
    with pytest.raises(errors.ConfigError, match=r"did you mean vits.yaml .*: continue_vitb14.yaml.*, small.yaml"):
        load_run_config("vit_s.yaml", require_dataset=False)
    (tmp_path / "vits.yaml").write_text("student: {arch: vit_nano}\n")
    assert load_run_config("vits.yaml", require_dataset=False).student.arch == "vit_nano", "one's own file comes first"


def test_help_leaves_out_what_help_slurm_shows(capsys):
    from dinov2_custom.run.train.train import Trainer

    parser = Trainer.parser()
    assert "--qos" not in parser.format_help() and "--ngpus" in parser.format_help()
    with pytest.raises(SystemExit, match="0"):
        parser.parse_args(["--help-slurm"])
    shown = capsys.readouterr().out
    assert all(flag in shown for flag in ("--qos", "--cluster", "--conda-env", "--sweep"))
    assert parser.parse_args(["--partition", "gpu"]).partition == "gpu"


@pytest.mark.parametrize(
    "line, found", [("tr", "train "), ("train --parti", "--partition "), ("export out --to safe", "safetensors ")]
)
def test_completion(line, found, tmp_path):
    pytest.importorskip("argcomplete")
    line = f"dinov2-custom {line}"
    asked = {"_ARGCOMPLETE": "1", "COMP_LINE": line, "COMP_POINT": str(len(line))}
    asked |= {"_ARGCOMPLETE_STDOUT_FILENAME": str(tmp_path / "answer")}
    code = "import sys; from dinov2_custom.cli import main; sys.argv = ['dinov2-custom']; main()"
    subprocess.run([sys.executable, "-c", code], env=os.environ | asked, check=True)
    assert (tmp_path / "answer").read_text() == found
