"""Choice of launcher, output and rejected arguments, without SLURM; tests/slurm has real jobs."""

import argparse
import inspect
import json
import os
import shlex
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest
import torch

from dinov2_custom.errors import ConfigError, DINOv2Error, LaunchError
from dinov2_custom.run import slurm
from dinov2_custom.run.submit import (
    Task,
    check_gpus,
    choose_launcher,
    get_args_parser,
    get_shared_folder,
    submit_jobs,
)
from dinov2_custom.run.train.train import main as train_main
from tests.train.batches import TINY
from tests.train.test_train import write_images

REPOSITORY = Path(__file__).resolve().parents[2]
TORCHRUN = dict(RANK="1", WORLD_SIZE="2", LOCAL_RANK="1", LOCAL_WORLD_SIZE="2", MASTER_ADDR="a", MASTER_PORT="1")


@pytest.fixture(autouse=True)
def former_path(tmp_path_factory, monkeypatch):
    """Hide this machine's SLURM and the user's cluster file by a PATH with only bash; return the former PATH."""
    former, folder = os.environ["PATH"], tmp_path_factory.mktemp("bin")
    (folder / "bash").symlink_to(shutil.which("bash"))
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(folder))
    return former


def parse(*arguments):
    return get_args_parser().parse_args(list(arguments))


def train(*arguments, cwd, environment=None):
    env = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", **(environment or {})}
    command = [sys.executable, str(REPOSITORY / "run/train/train.py"), *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=600)


@pytest.mark.parametrize(
    "flags, environment, launcher",
    [
        ([], {}, "local"),
        (["--ngpus", "2"], {}, "local"),
        (["--nodes", "2"], {}, "slurm"),
        (["--partition", "p"], {}, "slurm"),
        (["--cluster", "c"], {}, "slurm"),
        (["--conda-env", "e"], {}, "slurm"),
        (["--launcher", "slurm"], {}, "slurm"),
        ([], TORCHRUN, "inline"),
        ([], {"TORCHELASTIC_RUN_ID": "x"}, "inline"),
        (["--launcher", "local"], {"SLURM_JOB_ID": "3", "SLURM_NTASKS": "1", "SLURM_PROCID": "0"}, "local"),
        (["--launcher", "inline"], {}, "inline"),
        (["--launcher", "local"], TORCHRUN, "local"),  # left in a shell
        (["--partition", "p"], {"RANK": "0", "WORLD_SIZE": "2"}, "slurm"),
        (["--launcher", "local"], {"RANK": "0", "WORLD_SIZE": "2"}, "local"),
    ],
)
def test_choice_of_the_launcher(flags, environment, launcher):
    assert choose_launcher(parse(*flags), environment) == launcher


@pytest.mark.parametrize(
    "flags, environment, message",
    [
        (
            ["--launcher", "local", "--qos", "q", "--venv", "v"],
            {},
            "--qos, --venv: expected --launcher slurm, got local",
        ),
        (["--partition", "p"], TORCHRUN, "--partition: expected --launcher slurm, got inline"),
        (["--launcher", "slurm"], TORCHRUN, "expected a single process"),
        (["--launcher", "local", "--nodes", "2"], {}, "--nodes: expected --launcher slurm"),
    ],
)
def test_flags_without_use_are_refused(flags, environment, message):
    with pytest.raises(LaunchError, match=message):
        choose_launcher(parse(*flags), environment)


@pytest.mark.parametrize(
    ("flags", "rank", "warning"),
    [
        ([], 0, ""),
        (["--ngpus", "2"], 0, ""),
        (["--ngpus", "2", "--nodes", "2"], 0, ""),
        (["--ngpus", "8"], 1, ""),
        (
            ["--ngpus", "8"],
            0,
            "--ngpus 8: not used, since torchrun started 2 processes on each of 2 nodes; leave it out",
        ),
        (["--ngpus", "3", "--nodes", "4"], 0, "--ngpus 3, --nodes 4: not used, since torchrun started"),
    ],
)
def test_counts_that_contradict_the_processes_that_are_there(flags, rank, warning, capsys, monkeypatch):
    class Echo(Task):
        def __call__(self):
            return 3

    for name, value in (TORCHRUN | {"RANK": str(rank), "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}).items():
        monkeypatch.setenv(name, value)
    assert submit_jobs(Echo, parse(*flags), name="x") == 3
    said = capsys.readouterr().err
    assert said.startswith(f"warning: {warning}") and said.count("\n") == 1 if warning else said == ""


def test_upstreams_signatures():
    assert list(inspect.signature(get_args_parser).parameters) == ["description", "parents", "add_help"]
    assert list(inspect.signature(submit_jobs).parameters) == ["task_class", "args", "name"]
    assert list(inspect.signature(get_shared_folder).parameters) == []


def test_the_shared_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("DINOV2_CHECKPOINT_PATH", str(tmp_path))
    assert get_shared_folder().parent.parent == tmp_path and get_shared_folder().name == "experiments"
    monkeypatch.delenv("DINOV2_CHECKPOINT_PATH")
    assert get_shared_folder() == Path("outputs").absolute()


def test_a_task_is_what_submitit_requeues():
    args = argparse.Namespace(output_dir="o")
    again = Task(args).checkpoint()
    assert type(again).__name__ == "DelayedSubmission" and again.function.args is args


def test_inline_passes_the_arguments_and_the_code():
    class Echo(Task):
        def __call__(self):
            return 40 + self.args.nodes

    assert submit_jobs(Echo, parse("--launcher", "inline", "--nodes", "1"), name="x") == 41


def test_a_job_around_the_command_is_not_requeued(monkeypatch, tmp_path):
    (tmp_path / "stopped_by_sigterm.py").write_text("def main(args): return 143\n")
    (tmp_path / "scontrol").write_text(f"#!/bin/bash\necho JobState=RUNNING\necho $* >>{tmp_path}/asked\n")
    (tmp_path / "scontrol").chmod(0o755)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    for name, value in dict(SUBMITIT_EXECUTOR="slurm", SLURM_JOB_ID="7").items():  # a notebook that submitit started
        monkeypatch.setenv(name, value)

    class Stopped(Task):
        module = "stopped_by_sigterm"

    assert submit_jobs(Stopped, parse("--launcher", "inline"), name="x") == 143
    assert not (tmp_path / "asked").exists()


class SeenGpus(Task):
    def __call__(self):
        return len(os.environ["CUDA_VISIBLE_DEVICES"])


@pytest.mark.parametrize("environment", [{}, TORCHRUN])
@pytest.mark.parametrize("flags, seen", [([], 3), (["--cpu"], 0)])
def test_cpu_hides_the_gpus_under_torchrun_too(monkeypatch, environment, flags, seen):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert submit_jobs(SeenGpus, parse(*flags), name="x") == seen


class Plain:
    """A foreign class, whose launch loads no configuration."""

    def __init__(self, args):
        self.args = args


def script_of(capsys, *flags, task=Plain):
    """Return the batch script for these flags, created in this process."""
    parser = get_args_parser()
    parser.add_argument("--output-dir", default="/tmp/out")
    parser.add_argument("opts", nargs="*", default=[])
    assert submit_jobs(task, parser.parse_args(["--launcher", "slurm", "--dry-run", *flags]), name="x") == 0
    return capsys.readouterr().out


@pytest.fixture
def only_commands(former_path, tmp_path, monkeypatch):
    """A PATH with the commands of a batch script, in which srun and SLURM's other commands do nothing."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("bash", "cat", "date", "hostname", "mkdir", "rm", "touch"):
        if found := shutil.which(name, path=former_path):
            (folder / name).symlink_to(found)
    for name in ("srun", "scontrol", "module", "apptainer"):
        (folder / name).write_text("#!/bin/bash\n")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(folder))


def flags_with_a_value():
    actions = [*get_args_parser()._actions, get_args_parser().add_argument("--output-dir")]
    return [action.option_strings[0] for action in actions if action.option_strings and action.nargs != 0]


HOSTILE = "x\" ; touch PWNED; `touch PWNED` $(touch PWNED) && touch PWNED '; touch PWNED; ' # %j ${IFS}"


@pytest.mark.parametrize(
    "hostile, in_file", [(HOSTILE, False), ("x\ntouch PWNED\n", False), ("x\ntouch PWNED\n", True)]
)
@pytest.mark.parametrize("flag", [flag for flag in flags_with_a_value() if flag != "--setup"])  # which is bash
def test_no_value_becomes_a_command_of_the_job(capsys, tmp_path, monkeypatch, only_commands, flag, hostile, in_file):
    value = f"comment={hostile}" if flag == "--slurm" else f"a={hostile},{hostile}" if flag == "--sweep" else hostile
    given = [f"{flag}={value}" if flag != "--modules" else flag] + ([value] if flag == "--modules" else [])
    if in_file:
        (tmp_path / "c.yaml").write_text(f"{flag[2:]}: {json.dumps(value)}\n")
        given = ["--cluster", str(tmp_path / "c.yaml")]
    given += [] if flag == "--output-dir" else ["--output-dir", str(tmp_path / "out")]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train.py", *given])
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_NTASKS", "1")
    try:
        script = script_of(capsys, *given)
    except (SystemExit, DINOv2Error):
        return  # refused
    subprocess.run(["bash", "-c", script], cwd=tmp_path, capture_output=True, timeout=600)
    assert not (tmp_path / "PWNED").exists(), script
    sbatch = [line for line in script.splitlines() if "PWNED" in line and line.startswith("#SBATCH")]
    assert all(shlex.split(line, comments=False)[1].startswith("--") for line in sbatch)


def test_a_line_break_is_refused_by_its_flag(capsys):
    for flag in ("--comment", "--account", "--partition", "--job-name", "--output-dir"):
        with pytest.raises(LaunchError, match=f"{flag}: expected one line"):
            script_of(capsys, f"{flag}=a\nb")
    with pytest.raises(LaunchError, match="--output-dir: expected no % but in %j"):
        script_of(capsys, "--output-dir", "/tmp/100%")


@pytest.mark.parametrize(
    "flags, there, absent",
    [
        (["--gres", "gpu:a100:2"], ["ntasks-per-node=2", "gres=gpu:a100:2"], ["gpus-per-node"]),
        (["--gres", "gpu"], ["ntasks-per-node=1", "gres=gpu"], ["gpus-per-node"]),
        (["--gres", "tmpdisk:10"], ["ntasks-per-node=8", "gres=tmpdisk:10", "gpus-per-node=8"], []),
        (["--gres", "gpu:2,tmpdisk:10", "--cpu"], ["ntasks-per-node=8", "gres=tmpdisk:10"], ["gpu"]),
        (["--gres", "gpu:2", "--cpu", "--ngpus", "3"], ["ntasks-per-node=3"], ["gpu"]),
        (["--ngpus", "3"], ["ntasks-per-node=3", "gpus-per-node=3"], []),
        (["-J", "mine"], ["job-name=mine"], ["job-name=x"]),
        (["--slurm", "no-requeue"], ["no-requeue"], ["--requeue"]),
        (["--slurm", "mail_type=END", "--slurm", "hold"], ["mail-type=END", "hold"], []),
    ],
)
def test_requested_environment(capsys, flags, there, absent):
    options = [line for line in script_of(capsys, *flags).splitlines() if line.startswith("#SBATCH")]
    assert all(f"#SBATCH --{one}" in options for one in there), options
    assert not any(word in line for line in options for word in absent)


def test_the_time_before_the_limit_is_what_slurm_was_asked_for(capsys):
    script = script_of(capsys, "--signal-delay", "900", "--time", "10:00")
    assert "#SBATCH --signal=USR2@300\n" in script and "DINOV2_SIGNAL_DELAY=300\n" in script


def test_variables_of_the_shell_change_no_job(capsys, monkeypatch):
    """sbatch's variables would override the script's lines."""
    names = (
        "NO_REQUEUE",
        "ARRAY_INX",
        "WAIT",
        "GPUS",
        "GPUS_PER_TASK",
        "GRES",
        "TIMELIMIT",
        "OUTPUT",
        "PARTITION",
        "QOS",
    )
    shell = {f"SBATCH_{name}": "1" for name in names}
    for name, value in (shell | {"SLURM_JOB_ID": "7", "SLURM_CONF": "c", "RANK": "3"}).items():
        monkeypatch.setenv(name, value)
    with slurm.environment_of_sbatch(script_of(capsys, "--cpu", "--partition", "p")):
        kept = {name for name in os.environ if name.startswith(("SBATCH_", "SLURM_", "RANK"))}
    assert kept == {"SBATCH_QOS", "SLURM_CONF"}  # the script does not set these
    assert os.environ["SLURM_JOB_ID"] == "7" and os.environ["SBATCH_GPUS"] == "1"


@pytest.mark.parametrize(
    "slurm_does, said",
    [
        ("scontrol() { :; }; sleep() { return 143; }", ""),  # SIGTERM to everything, as it requeues the job
        ("scontrol() { :; }; sleep() { :; }", "it could not be requeued"),
        ("scontrol() { return 1; }; sleep() { return 143; }", "it could not be requeued"),
    ],
)
def test_only_a_failed_requeue_is_reported(capsys, slurm_does, said):
    script = script_of(capsys)
    functions = script[script.index("fail() {") : script.index("[[ ")]
    code = f"{functions}\npython=(bash -c 'exit 200')\n{slurm_does}\nfinish 0"
    done = subprocess.run(["bash", "-c", code], capture_output=True, text=True)
    assert done.returncode == 1 and (said in done.stdout if said else not done.stdout), done


def test_processes_and_gpus_that_disagree(capsys):
    with pytest.raises(
        LaunchError, match="--ngpus, --gres: expected as many processes per node as GPUs, got 4 and gpu:2"
    ):
        script_of(capsys, "--gres", "gpu:2", "--ngpus", "4")


@pytest.mark.parametrize(
    "file, flags, there",
    [
        ("gres: gpu:a100:4", ["--ngpus", "2"], ["ntasks-per-node=2", "gres=gpu:a100:2"]),
        ("gres: gpu:4,tmpdisk:10", ["--ngpus", "2"], ["ntasks-per-node=2", "gres=gpu:2,tmpdisk:10"]),
        ("gres: gpu:1g.10gb:4", ["--ngpus", "2"], ["ntasks-per-node=2", "gres=gpu:1g.10gb:2"]),
        ("gres: gpu", ["--ngpus", "2"], ["ntasks-per-node=2", "gres=gpu:2"]),
        ("ngpus: 4", ["--gres", "gpu:2"], ["ntasks-per-node=2", "gres=gpu:2"]),
        ("gres: gpu:4", ["--cpu"], ["ntasks-per-node=8"]),
    ],
)
def test_flag_overrides_the_gpus_of_the_file(capsys, tmp_path, file, flags, there):
    (tmp_path / "c.yaml").write_text(file)
    options = script_of(capsys, "--cluster", str(tmp_path / "c.yaml"), *flags)
    assert all(f"#SBATCH --{one}\n" in options for one in there), options


def test_arguments_of_srun_are_words(capsys):
    script = script_of(capsys, "--srun-arg=--container-image=a b", "--srun-arg=--mpi=none")
    (line,) = [line for line in script.splitlines() if line.startswith("srun --unbuffered")]
    assert " '--container-image=a b' --mpi=none " in line


def test_a_sweep_is_a_job_array(capsys, tmp_path):
    flags = ["--sweep", "a=1,2", "--sweep", "b=x,y,z", "--output-dir", str(tmp_path)]
    script = script_of(capsys, *flags)
    assert "#SBATCH --array=0-5%6\n" in script and f"#SBATCH --output={tmp_path}/%A_%a_log.out\n" in script
    assert f"base={tmp_path}\nfolder=$base/$SLURM_ARRAY_TASK_ID\n" in script
    with pytest.raises(LaunchError, match="expected no %j with --sweep"):
        script_of(capsys, "--sweep", "a=1,2", "--output-dir", "/tmp/%j")


def test_a_sweep_checks_every_run(tmp_path):
    flags = ["--partition", "p", "--output-dir", str(tmp_path), *TINY, f"train.dataset_path={tmp_path}"]
    with pytest.raises(ConfigError, match="optim.base_lr"):
        train_main([*flags, "--dry-run", "--sweep", "optim.base_lr=1e-3,much"])


def test_a_job_without_gpus_sees_none(tmp_path):
    images = write_images(tmp_path / "images", 2)
    flags = ["--dry-run", "--partition", "p", "--output-dir", "o", *TINY, f"train.dataset_path={images}"]
    hidden, not_hidden = (train(*flags, *cpu, cwd=tmp_path).stdout for cpu in (["--cpu"], []))
    assert "\nexport CUDA_VISIBLE_DEVICES= " in hidden and "gpus-per-node" not in hidden
    assert "CUDA_VISIBLE_DEVICES" not in not_hidden and "gpus-per-node" in not_hidden


def test_dry_run_prints_script_and_configuration_and_leaves_nothing(tmp_path):
    images = write_images(tmp_path / "images", 2)
    flags = ["--ngpus", "2", "--nodes", "3", "--account", "me", "--slurm", "mail-type=END", "--mem-per-gpu", "30G"]
    more = ["--timeout", "10:00:00", "--constraint", "a", "--use-volta32", "--exclusive", "--gres", "gpu:h100:2"]
    before = sorted(tmp_path.iterdir())
    done = train(
        "--dry-run", *flags, *more, "--output-dir", "out dir", *TINY, f"train.dataset_path={images}", cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    for option in (
        "nodes=3",
        "ntasks-per-node=2",
        "account=me",
        "mail-type=END",
        "mem-per-gpu=30G",
        "time=600",
        "requeue",
    ):
        assert f"#SBATCH --{option}\n" in done.stdout
    assert "#SBATCH --exclusive\n" in done.stdout and "#SBATCH --gres=gpu:h100:2\n" in done.stdout
    assert "#SBATCH --constraint='a&volta32gb'\n" in done.stdout and "gpus-per-node" not in done.stdout
    assert f"dataset_path: {images}\n" in done.stdout and "  arch: vit_nano\n" in done.stdout
    script, _, configuration = done.stdout.partition("\n# configuration\n")
    assert "arch: vit_nano" in configuration and "arch: vit_nano" not in script, "the configuration comes last"
    assert "# submitted by: cd " in script and "--dry-run" not in script
    assert done.stderr.splitlines()[-1] == "# SLURM was not asked: no sbatch on PATH"
    assert subprocess.run(["bash", "-n"], input=done.stdout, text=True).returncode == 0
    assert sorted(tmp_path.iterdir()) == before


def test_local_dry_run(tmp_path):
    done = train("--dry-run", "--cpu", "--ngpus", "2", *TINY, "train.dataset_path=x", cwd=tmp_path)
    assert done.returncode == 0 and done.stdout.startswith("# local, 2 processes: ")
    assert "  arch: vit_nano\n" in done.stdout and not list(tmp_path.iterdir())


GPU = "expected to use the GPUs that CUDA_VISIBLE_DEVICES=99 names"
LACKING = [
    (["--partition", "p"], "expected SLURM's commands on PATH"),
    (["--launcher", "slurm"], "expected SLURM's commands on PATH"),
    (["--venv", "v"], "expected an environment with torch"),
    (["--venv", "v", "--dry-run"], "expected an environment with torch"),
    (["--ngpus", "2"], GPU),
    (["--launcher", "local"], GPU),
    (["--launcher", "inline"], GPU),
]


@pytest.mark.parametrize("flags, lacking", LACKING, ids=[" ".join(flags) for flags, _ in LACKING])
def test_a_bad_configuration_is_refused_before_what_the_machine_lacks(tmp_path, flags, lacking):
    if "v" in flags:
        venv.create(tmp_path / "v", symlinks=True)
    (tmp_path / "images").mkdir()
    before = sorted(tmp_path.iterdir())
    environment = {"CUDA_VISIBLE_DEVICES": "99"}
    arguments = [*flags, "--output-dir", "out", *TINY, "train.dataset_path=images"]
    done = train(*arguments, "optim.epoch=3", cwd=tmp_path, environment=environment)
    assert done.returncode == 1 and done.stderr.startswith("error: ") and "optim.epochs" in done.stderr
    assert lacking not in done.stderr and sorted(tmp_path.iterdir()) == before
    assert lacking in train(*arguments, cwd=tmp_path, environment=environment).stderr


def test_too_many_gpus_are_refused_after_the_configuration(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    arguments = ["--ngpus", "3", "--output-dir", str(tmp_path / "out"), "train.dataset_path=x"]
    with pytest.raises(ConfigError, match="optim.epochs"):
        train_main([*arguments, "optim.epoch=3"])
    with pytest.raises(LaunchError, match="the 2 GPUs of this machine, got 3"):
        train_main(arguments)


@pytest.mark.parametrize("script", ["eval/knn", "eval/linear", "eval/log_regression", "embed"])
@pytest.mark.parametrize("flags", [["--partition", "p"], ["--launcher", "inline"], ["--ngpus", "2"]], ids=" ".join)
def test_weights_that_are_not_there_are_refused_first(tmp_path, script, flags):
    weights = ["absent.pth", "images"] if script == "embed" else ["--pretrained-weights", "absent.pth"]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "CUDA_VISIBLE_DEVICES": "99"}
    command = [sys.executable, str(REPOSITORY / f"run/{script}.py"), *weights, *flags]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert done.returncode == 1 and not list(tmp_path.iterdir())
    assert "expected a weight file or a run directory, got absent.pth" in done.stderr


def test_data_that_is_not_on_this_machine_is_a_warning(tmp_path):
    flags = ["--partition", "p", "--dry-run", "--output-dir", "out", *TINY]
    data = f"train.dataset_path=[{tmp_path}, 'Tar:path={tmp_path}/shards', s3://bucket/images]"
    done = train(*flags, data, "student.pretrained_weights=/nowhere/w.pth", cwd=tmp_path)
    said = [line for line in done.stderr.splitlines() if "on this machine" in line]
    assert [line.split(" on this")[0] for line in said] == [
        f"warning: train.dataset_path: found nothing at {tmp_path}/shards",
        "warning: student.pretrained_weights: found nothing at /nowhere/w.pth",
    ], done.stderr
    assert done.returncode == 0


def test_an_environment_without_torch_is_refused_before_the_queue(tmp_path):
    venv.create(tmp_path / "v", symlinks=True)
    flags = ["--dry-run", "--venv", tmp_path / "v", *TINY, "train.dataset_path=x"]
    done = train(*flags, cwd=tmp_path)
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and done.stdout == ""
    assert "--venv, --conda-env, --python: expected an environment with torch, numpy, PIL, omegaconf," in done.stderr


def test_without_slurm(tmp_path):
    done = train("--partition", "p", "train.dataset_path=x", cwd=tmp_path)
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: expected SLURM's commands on PATH, got no sbatch, srun, scontrol")
    assert not list(tmp_path.iterdir())


def test_submitting_imports_no_torch():
    code = (
        "import sys\nfrom dinov2_custom.run.train.train import main\n"
        "main(['--partition', 'p', '--dry-run', 'train.dataset_path=x'])\n"
        "assert not {'torch', 'numpy'} & set(sys.modules)"
    )
    env = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    subprocess.run([sys.executable, "-c", code], check=True, env=env, stdout=subprocess.DEVNULL)


@pytest.mark.parametrize("name, job", [("knn", "knn"), ("linear", "linear"), ("log_regression", "logreg")])
def test_the_evaluations_share_the_launcher(tmp_path, name, job):
    script = str(REPOSITORY / f"run/eval/{name}.py")
    env = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    (tmp_path / "out" / "eval" / "training_9").mkdir(parents=True)
    (tmp_path / "out" / "eval" / "training_9" / "teacher_checkpoint.pth").touch()
    flags = ["--partition", "p", "--ngpus", "1", "--pretrained-weights", "out", "--dry-run"]
    done = subprocess.run([sys.executable, script, *flags], env=env, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith("error: --train-dataset, --val-dataset: expected a dataset")
    flags += ["--train-dataset", f"LabelledFolder:root={tmp_path}", "--val-dataset", "LabelledFolder:root=/nowhere"]
    done = subprocess.run([sys.executable, script, *flags], env=env, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines()[0].startswith("warning: --val-dataset: found nothing at /nowhere on this machine")
    assert f"#SBATCH --job-name=dinov2:{job}\n" in done.stdout
    flags[5] = "absent.pth"
    done = subprocess.run([sys.executable, script, *flags], env=env, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith("error: --pretrained-weights: expected a weight file")


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"CUDA_VISIBLE_DEVICES": ""},
        {"CUDA_VISIBLE_DEVICES": "-1"},
        {"CUDA_VISIBLE_DEVICES": "NoDevFiles"},
        {"SKYPILOT_NUM_GPUS_PER_NODE": "0"},
        {"SKYPILOT_NUM_GPUS_PER_NODE": "8", "CUDA_VISIBLE_DEVICES": ""},
    ],
)
def test_none_given(no_gpu, environment):
    check_gpus(environment)


@pytest.mark.parametrize("environment", [{"CUDA_VISIBLE_DEVICES": "0,1"}, {"SKYPILOT_NUM_GPUS_PER_NODE": "8"}])
@pytest.mark.parametrize("cuda, why", [(None, "is a build without CUDA"), ("12.8", "check that `nvidia-smi` works")])
def test_given_and_not_seen(no_gpu, monkeypatch, environment, cuda, why):
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.version, "hip", None)
    (pair,) = environment.items()
    with pytest.raises(LaunchError) as e:
        check_gpus(environment)
    assert "=".join(pair) in str(e.value) and why in str(e.value) and "--cpu" in str(e.value)


def test_there_and_not_usable(no_gpu, monkeypatch):
    """NVML counts the GPUs of a driver that is too old for this torch."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    with pytest.raises(LaunchError, match="the 2 GPUs of this machine, got none: .*driver is new enough, or add --cpu"):
        check_gpus({})
    check_gpus({"CUDA_VISIBLE_DEVICES": ""})


def test_given_and_seen(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    check_gpus({"CUDA_VISIBLE_DEVICES": "0"})


def test_every_task_checks_gpus_before_it_starts(no_gpu, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    with pytest.raises(LaunchError, match="CUDA_VISIBLE_DEVICES=0"):
        Task(None)()
