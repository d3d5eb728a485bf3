import argparse

import pytest

from dinov2_custom.cli import train_parser as get_train_args_parser
from dinov2_custom.run.args import get_args_parser, minutes


def parse(*arguments):
    parser = get_args_parser(parents=[get_train_args_parser(add_help=False)])
    return parser.parse_args(list(arguments))


@pytest.mark.parametrize(
    "text, expected",
    [
        ("2800", 2800),
        ("00:10:00", 10),
        ("47:30:00", 2850),
        ("0:00:30", 1),
        ("1-00", 1440),
        ("10:00", 10),
        ("0:30", 1),
        ("2-12:30:01", 3631),
    ],
)
def test_durations(text, expected):
    assert minutes(text) == expected


@pytest.mark.parametrize("text", ["0", "-5", "5x", "00:00:00", "", "1:2:3", "1:2"])
def test_what_is_no_duration(text):
    with pytest.raises(argparse.ArgumentTypeError, match="HH:MM:SS"):
        minutes(text)


def test_upstreams_flags_and_their_other_names():
    args = parse(
        *"--gpus-per-node 4 --nnodes 2 --timeout 60 --partition p --use-volta32 --comment c --exclude n1".split()
    )
    assert (args.ngpus, args.nodes, args.timeout, args.partition) == (4, 2, 60, "p")
    assert (args.use_volta32, args.comment, args.exclude) == (True, "c", "n1")
    assert parse("--gpus", "3").ngpus == parse("--ngpus", "3").ngpus == 3


def test_the_letters_of_sbatch():
    args = parse(*"-p gpu -A lab -q gold -N 2 -t 10:00 -J mine a=1".split())
    assert (args.partition, args.account, args.qos, args.nodes, args.timeout) == ("gpu", "lab", "gold", 2, 10)
    assert args.job_name == "mine" and args.opts == ["a=1"]
    assert parse("--time", "1-00").timeout == 1440


def test_flags_of_the_program_and_overrides_stand_anywhere():
    args = parse("a=1", "--partition", "p", "--config-file", "f", "b=2", "--output-dir", "o", "c=3")
    assert (args.partition, args.config_file, args.output_dir, args.opts) == ("p", "f", "o", ["a=1", "b=2", "c=3"])


def test_modules_end_where_overrides_begin():
    args = parse("a=1", "--modules", "cuda/12", "gcc", "b=2", "--modules", "python", "--nodes", "2", "c=3")
    assert (args.modules, args.opts, args.nodes) == (["cuda/12", "gcc", "python"], ["a=1", "b=2", "c=3"], 2)


def test_values_of_a_sweep():
    args = parse("--sweep", "optim.base_lr=1e-3,2e-3", "--sweep", "crops.local_crops_scale=[0.1,0.2],[0.1,0.3]", "a=1")
    assert args.sweep == [
        ["optim.base_lr=1e-3", "optim.base_lr=2e-3"],
        ["crops.local_crops_scale=[0.1,0.2]", "crops.local_crops_scale=[0.1,0.3]"],
    ]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--modules", "a=1"], "--modules"),
        (["--ngpus", "0"], "expected a number of at least 1, got '0'"),
        (["--slurm", "--x=1"], "expected"),
        (["--slurm=--mail=x"], "expected an sbatch option as key=value without dashes"),
        (["--slurm", "output=x"], "the job script does not set itself, got output; --output-dir chooses the folder"),
        (["--partitoin", "x"], "did you mean --partition?"),
        (["--launcher", "pbs"], "invalid choice"),
        (["--mail-user", "me@lab"], "take --slurm mail-user=..."),
        (["--mail-user=me@lab"], "take --slurm mail-user=me@lab"),
        (["--hold"], "take --slurm hold\n"),
        (["--array", "0-3"], "take --sweep KEY=VALUE,VALUE"),
        (["--ntasks", "8"], "take --ngpus"),
        (["--slurm", "nodes=2"], "got nodes; take --nodes"),
        (["--slurm", "ntasks_per_node=2"], "take --ngpus"),
        (["--slurm", "gpus-per-node=a100:2"], "--gres gpu:TYPE:N"),
        (["--slurm", "comment=a\nb"], "expected an sbatch option as key=value"),
        (["--sweep", "optim.base_lr=1"], "two values or more"),
        (["--sweep", "optim.base_lr=1,,2"], "two values or more"),
        (["--partition", ""], "argument --partition/-p: expected a value, got ''; leave the flag out"),
        (["--conda-env="], "expected a value"),
        (["--cluster", " "], "expected a value"),
        (["--srun-arg="], "expected a value"),
        (["--srun-arg", "--mpi=none"], "one that begins with a dash: --srun-arg=--..."),
        (["--local-rank=0"], "start with torchrun"),
        (["--local_rank", "0"], "start with torchrun"),
    ],
)
def test_mistakes(capsys, arguments, message):
    with pytest.raises(SystemExit):
        parse(*arguments)
    assert message in capsys.readouterr().err


def test_nothing_given_is_none():
    args = parse()
    assert args.ngpus is args.nodes is args.timeout is args.partition is args.launcher is args.exclusive is None
