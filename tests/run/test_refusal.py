"""SLURM's messages are translated into errors about the right flag; tests/slurm uses a real SLURM."""

import pytest

from dinov2_custom.run.refusal import closed_partition, explain

SCRIPT = "#!/bin/bash\n#SBATCH --partition=gpu\n#SBATCH --account=lab\n#SBATCH --qos=gold\n#SBATCH --time=2800\n"


@pytest.mark.parametrize(
    "said, words",
    [
        ("Invalid account or account/partition combination specified", "got account=lab partition=gpu qos=gold"),
        ("Invalid qos specification", "--qos: expected a quality of service you may use, got qos=gold"),
        ("invalid partition specified: gpu", "--partition: expected one of none, got partition=gpu"),
        (
            "Job violates accounting/QOS policy (job submit limit, user's size and/or time limits)",
            "--timeout: expected a job within the limits of your account and QOS, got time=2800",
        ),
        ("the job could never start: PENDING (QOSMaxWallDurationPerJobLimit)", "within the limits of your account"),
        ("something new", "SLURM: expected a job that it accepts, got: something new"),
    ],
)
def test_message_names_the_relevant_flag(said, words, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    text = explain(f"sbatch: error: {said}\n", SCRIPT)
    assert words in text and "\n" not in text


# as SLURM 22.05 prints them
PARTITIONS = """\
PartitionName=cpu AllowGroups=ALL AllowAccounts=ALL AllowQos=ALL Default=YES MaxTime=01:00:00 State=UP TotalCPUs=24
PartitionName=gpu AllowGroups=ALL AllowAccounts=lab,vision AllowQos=ALL Default=NO MaxTime=2-00:00:00 State=UP
PartitionName=old AllowGroups=ALL AllowAccounts=ALL DenyQos=gold Default=NO MaxTime=UNLIMITED State=UP
PartitionName=new AllowGroups=ALL DenyAccounts=lab AllowQos=gold,silver Default=NO MaxTime=UNLIMITED State=DOWN
"""


@pytest.mark.parametrize(
    "options, reason",
    [
        ("time=60", ""),
        ("time=61", "PartitionTimeLimit"),  # of the default one
        ("partition=gpu account=lab", ""),
        ("partition=gpu", ""),  # the user's own account is vision
        ("partition=gpu account=guest", "account guest, where gpu allows lab,vision"),
        ("partition=gpu,cpu account=guest time=30", ""),
        ("partition=gpu,cpu account=guest time=90", "PartitionTimeLimit"),
        ("partition=old qos=gold", "old allows QOS others"),
        ("partition=old", ""),
        ("partition=new", "partition DOWN"),
        ("partition=unknown", ""),  # sbatch has refused it before
    ],
)
def test_a_partition_that_would_never_run_the_job(options, reason, tmp_path, monkeypatch):
    (tmp_path / "scontrol").write_text(f"#!/bin/bash\necho '{PARTITIONS}'\n")
    (tmp_path / "sacctmgr").write_text("#!/bin/bash\necho vision\n")
    for name in ("scontrol", "sacctmgr"):
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.delenv("SBATCH_PARTITION", raising=False)
    script = "#!/bin/bash\n" + "".join(f"#SBATCH --{option}\n" for option in options.split())
    assert closed_partition(script) == reason
