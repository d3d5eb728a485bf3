from pathlib import Path

import pytest

from dinov2_custom.errors import ConfigError
from dinov2_custom.run import cluster_file
from dinov2_custom.run.args import CLUSTER_OPTIONS, get_args_parser


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.delenv("XDG_CONFIG_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".config" / "dinov2_custom" / "cluster").mkdir(parents=True)
    return tmp_path


def filled(*arguments):
    args = get_args_parser().parse_args(list(arguments))
    cluster_file.fill_in(args)
    return args


def write(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


def test_defaults_without_a_file():
    args = filled()
    assert (args.nodes, args.timeout, args.signal_delay) == (1, 2800, 120)
    assert args.ngpus is args.cpus_per_task is None  # by what there is: run/submit.py
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
    assert "learning_rate: expected a launcher flag -> see --help" in text
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
