"""What SLURM says becomes a sentence about the right flag; a SLURM that answers is in tests/slurm."""

import pytest

from dinov2_custom.run.refusal import explain

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
def test_the_flag_that_is_meant(said, words, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    text = explain(f"sbatch: error: {said}\n", SCRIPT)
    assert words in text and "\n" not in text
