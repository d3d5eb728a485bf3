import argparse
from pathlib import Path

import pytest

from dinov2_custom.cli import train_parser as get_train_args_parser
from dinov2_custom.errors import ConfigError
from dinov2_custom.run.args import CLUSTER_OPTIONS, fill_in, get_args_parser, minutes


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
        (["--mail-user", "me@lab"], "use --slurm mail-user=..."),
        (["--mail-user=me@lab"], "use --slurm mail-user=me@lab"),
        (["--hold"], "use --slurm hold\n"),
        (["--array", "0-3"], "use --sweep KEY=VALUE,VALUE"),
        (["--ntasks", "8"], "use --ngpus"),
        (["--slurm", "nodes=2"], "got nodes; use --nodes"),
        (["--slurm", "ntasks_per_node=2"], "use --ngpus"),
        (["--slurm", "gpus-per-node=a100:2"], "--gres gpu:TYPE:N"),
        (["--slurm", "comment=a\nb"], "expected an sbatch option as key=value"),
        (["--sweep", "optim.base_lr=1"], "two values or more"),
        (["--sweep", "optim.base_lr=1,,2"], "two values or more"),
        (["--partition", ""], "argument --partition/-p: expected a value, got ''; leave the flag out"),
        (["--conda-env="], "expected a value"),
        (["--cluster", " "], "expected a value"),
        (["--srun-arg="], "expected a value"),
        (["--srun-arg=foo"], "expected an argument with its dashes, such as --mpi=none, got 'foo'"),
        (["-n", "8"], "-n: not a flag of the launcher -> use --ngpus, the processes of a node"),
        (["-n8"], "-n8: not a flag of the launcher -> use --ngpus, the processes of a node"),
        (["-c", "4"], "-c: not a flag of the launcher -> use --cpus-per-task"),
        (["-C", "a100"], "-> use --constraint=..."),
        (["-G", "2"], "-> use --ngpus or --gres gpu:TYPE:N"),
        (["-wn1"], "-> use --slurm nodelist=n1"),
        (["-d", "afterok:1"], "-> use --slurm dependency=..."),
        (["-xn1"], "-> use --exclude=n1"),
        (["-o", "log"], "-> --output-dir chooses the folder"),
        (["-a", "0-3"], "-> use --sweep KEY=VALUE,VALUE"),
        (["-config-file", "x"], "did you mean --config-file?"),
        (["-nodelist=n1"], "-> use --slurm nodelist=n1"),
        (["-H"], "-> use --slurm hold\n"),
        (["--gres", "gpu:a100:0"], "argument --gres: expected gpu:N or gpu:TYPE:N with N of at least 1"),
        (["--gres", "gpu:0"], "got 'gpu:0'; for no GPUs use --cpu"),
        (["--gres", "GPU:2"], "got 'GPU:2'"),
        (["--gres", "tmpdisk:10,gpu:a100:2(S:0)"], "and nothing after it, got 'gpu:a100:2(S:0)'"),
        (["--gres", "gpu="], "got 'gpu='"),
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


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.delenv("XDG_CONFIG_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".config" / "dinov2_custom" / "cluster").mkdir(parents=True)
    return tmp_path


def filled(*arguments):
    args = get_args_parser().parse_args(list(arguments))
    fill_in(args)
    return args


def write(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


def test_defaults_without_a_file():
    args = filled()
    assert (args.nodes, args.timeout, args.signal_delay) == (1, 2800, 120)
    assert args.ngpus == 8 and args.cpus_per_task is None  # by what the nodes have: run/submit.py
    assert args.partition is None and args.slurm == args.setup == [] and not args.exclusive


def test_flag_over_file_over_default(tmp_path):
    path = write(tmp_path / "c.yaml", "partition: gpu\nngpus: 4\ntimeout: 47:30:00\nexclusive: true\nmodules: [a, b]\n")
    args = filled("--cluster", path, "--ngpus", "2")
    assert (args.partition, args.ngpus, args.timeout, args.exclusive) == ("gpu", 2, 2850, True)
    assert (args.modules, args.nodes) == (["a", "b"], 1)


def test_repeatable_flags_add_to_the_file(tmp_path):
    path = write(tmp_path / "c.yaml", "slurm:\n  hint: nomultithread\n  hold: true\nsetup: ['export A=1']\n")
    args = filled("--cluster", path, "--slurm", "licenses=x", "--setup", "export B=2")
    assert args.slurm == ["hint=nomultithread", "hold", "licenses=x"]
    assert args.setup == ["export A=1", "export B=2"]


def test_options_of_sbatch_as_yaml_has_them(tmp_path):
    path = write(tmp_path / "c.yaml", "slurm: {mail-type: [END, FAIL], comment: null, hint: , hold: true}\n")
    assert filled("--cluster", path).slurm == ["mail-type=END,FAIL", "hold"]
    for text in ("slurm: {hold: false}", "slurm: {comment: {a: b}}", "slurm: {a: [[b]]}"):
        with pytest.raises(ConfigError, match="slurm: expected a value or true for"):
            filled("--cluster", write(tmp_path / "c.yaml", text))
    with pytest.raises(ConfigError, match=r"modules: expected one value, got \['a'\]"):
        filled("--cluster", write(tmp_path / "c.yaml", "modules: [[a], b]"))


def test_another_environment_than_the_files(tmp_path):
    path = write(tmp_path / "c.yaml", "conda-env: lab\nmodules: cuda\n")
    assert (filled("--cluster", path).conda_env, filled("--cluster", path).modules) == ("lab", ["cuda"])
    args = filled("--cluster", path, "--venv", "v")
    assert (args.conda_env, args.venv, args.modules) == (None, "v", ["cuda"])


def test_the_users_file_is_read_without_a_flag_and_names_are_looked_up(home):
    folder = home / ".config" / "dinov2_custom"
    write(folder / "cluster.yaml", "partition: mine\n")
    write(folder / "cluster" / "lab.yaml", "gpus-per-node: 3\n")
    assert filled().partition == "mine"
    assert (filled("--cluster", "lab").partition, filled("--cluster", "lab").ngpus) == (None, 3)


def test_the_example_is_valid():
    args = filled("--cluster", "example")
    assert (args.partition, args.account, args.timeout, args.slurm) == ("gpu", None, 1440, ["hint=nomultithread"])


def test_all_mistakes_at_once(tmp_path):
    path = write(
        tmp_path / "c.yaml", "partitoin: x\nngpus: many\ntimeout: 1:2:3\nexclusive: 3\nlearning_rate: 1\nmem: [1]\n"
    )
    with pytest.raises(ConfigError) as caught:
        filled("--cluster", path)
    text = str(caught.value)
    assert "partitoin: expected a launcher flag -> did you mean partition?" in text
    assert "learning_rate: expected a launcher flag -> see --help-slurm" in text
    assert "ngpus: expected a number" in text and "timeout: expected minutes" in text
    assert "exclusive: expected true or false" in text and "mem: expected one value" in text


@pytest.mark.parametrize("text, message", [("a: [", "expected YAML"), ("- a", "`flag: value` lines")])
def test_what_is_no_cluster_file(tmp_path, text, message):
    with pytest.raises(ConfigError, match=message):
        filled("--cluster", write(tmp_path / "c.yaml", text))


def test_unknown_names_list_the_known_ones():
    with pytest.raises(ConfigError, match="expected one of example, or a YAML file, got 'nope'"):
        filled("--cluster", "nope")
    with pytest.raises(ConfigError, match="got nothing at /nope/c.yaml"):
        filled("--cluster", "/nope/c.yaml")


def test_every_option_may_stand_in_a_file():
    assert {"partition", "account", "qos", "conda_env", "venv", "modules", "setup"} <= set(CLUSTER_OPTIONS)
