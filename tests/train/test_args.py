import subprocess
import sys

import pytest

from dinov2_custom.run.args import get_args_parser as get_launch_parser
from dinov2_custom.train.args import OverridesParser, get_args_parser


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
    for given, near in (("--foo", ""), ("--gpu", "--gpus"), ("--node=2", "--nodes"), ("--resume", "--no-resume")):
        with pytest.raises(SystemExit):
            parser.parse_args([given])
        error = capsys.readouterr().err
        assert f"{given}: unknown flag -> " + (f"did you mean {near}?" if near else "--help lists the flags") in error


def test_flags_are_not_abbreviated(capsys):
    assert "--config: unknown flag -> did you mean --config-file?" in error_of(capsys, "--config", "x")


def test_eval_is_said_to_be_unused(capsys):
    assert parse("--eval", "knn").eval == "knn"
    assert "--eval is accepted" in capsys.readouterr().err
    parse("--eval-only")
    assert capsys.readouterr().err == ""


def test_it_serves_as_a_parent():
    parser = OverridesParser(parents=[get_args_parser(add_help=False)])
    parser.add_argument("--nodes", type=int, default=1)
    args = parser.parse_args(["a=1", "--nodes", "2", "b=2", "--output-dir", "o"])
    assert (args.nodes, args.opts, args.output_dir) == (2, ["a=1", "b=2"], "o")


def test_known_args_leave_what_is_not_ours():
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
        "from dinov2_custom.train.args import get_args_parser\n"
        "get_args_parser().parse_args(['optim.epochs=1'])\n"
        "assert 'pydantic' not in sys.modules\n"
        "try: get_args_parser().parse_args(['optim.epoch'])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'omegaconf', 'numpy', 'yaml'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stderr=subprocess.DEVNULL)
