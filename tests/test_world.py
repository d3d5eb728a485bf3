"""World of a process, from environments as set by torchrun, SLURM and submitit."""

import pytest

from dinov2_custom.errors import LaunchError
from dinov2_custom.world import TORCHRUN_VARIABLES, World, expand_nodelist, world_from_environment

TORCHRUN = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "4",
    "MASTER_ADDR": "node7",
    "MASTER_PORT": "29400",
}
# task 3 of `srun -n 5` on three nodes, as SLURM 22.05 sets it
SLURM = {
    "SLURM_JOB_ID": "1234",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "3",
    "SLURM_NTASKS": "5",
    "SLURM_STEP_NUM_TASKS": "5",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_JOB_NODELIST": "gpu5,node[1-2]",
    "SLURM_STEP_NODELIST": "gpu5,node[1-2]",
    "SLURM_TASKS_PER_NODE": "2(x2),1",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2),1",
}


def test_nothing_set_is_a_single_process():
    assert world_from_environment({}) == World(rank=0, size=1, local_rank=0, local_size=1)


def test_complete_torchrun_environment_wins_over_slurm():
    world = world_from_environment(SLURM | TORCHRUN)
    assert world == World(5, 8, 1, 4, "node7", 29400)
    assert world.source == "torchrun"


@pytest.mark.parametrize("missing", ["RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT"])
def test_partial_torchrun_environment_names_what_is_missing(missing):
    environment = {name: value for name, value in TORCHRUN.items() if name != missing}
    with pytest.raises(LaunchError, match=rf"without {missing}\. Start with `torchrun`"):
        world_from_environment(environment)


@pytest.mark.parametrize("more", [{}, {"RANK": "0"}, {"RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost"}])
def test_a_world_size_of_one_is_a_single_process_whatever_else_is_missing(more):
    world = world_from_environment({"WORLD_SIZE": "1"} | more)
    assert world == World() and world.source == "single process"


@pytest.mark.parametrize("more", [{"RANK": "1"}, {"LOCAL_RANK": "2"}, {"LOCAL_WORLD_SIZE": "4"}])
def test_a_world_size_of_one_that_the_others_contradict_is_refused(more):
    with pytest.raises(LaunchError, match="expected 0 <= rank < world size"):
        world_from_environment({"WORLD_SIZE": "1"} | more)


def test_master_address_alone_means_nothing():
    assert world_from_environment({"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "23456"}).size == 1


@pytest.mark.parametrize(
    "change, message",
    [
        ({"RANK": "8"}, "rank 8 of world size 8"),
        ({"LOCAL_RANK": "4"}, "local rank 4 of 4"),
        ({"LOCAL_WORLD_SIZE": "9"}, "of 9 on the node and 8 in all"),
        ({"MASTER_PORT": "0"}, "master port 0"),
        ({"WORLD_SIZE": "many"}, "number in the environment variable WORLD_SIZE, got 'many'"),
    ],
)
def test_contradictory_torchrun_environment(change, message):
    with pytest.raises(LaunchError, match=message):
        world_from_environment(TORCHRUN | change)


def test_slurm_task():
    world = world_from_environment(SLURM)
    assert (world.rank, world.size, world.local_rank, world.local_size) == (3, 5, 1, 2)
    assert world.master_addr == "gpu5" and world.source == "SLURM"
    last = world_from_environment(SLURM | {"SLURM_PROCID": "4", "SLURM_LOCALID": "0", "SLURM_NODEID": "2"})
    assert last.local_size == 1
    assert last.master_port == world.master_port
    other_step = world_from_environment(SLURM | {"SLURM_STEP_ID": "1"})
    assert other_step.master_port != world.master_port


@pytest.mark.parametrize("job", ["1", "19999", "20000", "987654321", ""])
def test_slurm_port_stays_below_the_ephemeral_range(job):
    assert 10_000 <= world_from_environment(SLURM | {"SLURM_JOB_ID": job}).master_port < 30_000


def test_master_overrides_slurm():
    world = world_from_environment(SLURM | {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "23456"})
    assert (world.master_addr, world.master_port) == ("10.0.0.1", 23456)


@pytest.mark.parametrize(
    "change",
    [
        {"SLURM_STEP_ID": "4294967290"},  # interactive step of salloc
        {"SLURM_STEP_ID": "4294967291"},  # batch script
        {"SLURM_STEP_ID": "4294967292"},  # extern
        {"SLURM_STEP_ID": ""},  # sbatch script without srun
        {"SLURM_PROCID": ""},  # salloc shell on the login node
        {"SLURM_STEP_NUM_TASKS": "1"},  # srun -n1 in a job of five tasks
    ],
)
def test_slurm_without_a_multi_task_step_is_a_single_process(change):
    assert world_from_environment(SLURM | change).size == 1


def test_stale_rank_variable_beside_a_slurm_task_is_ignored():
    assert world_from_environment(SLURM | {"WORLD_SIZE": "3"}).size == 5


@pytest.mark.parametrize("name", ["OMPI_COMM_WORLD_SIZE", "PMI_SIZE"])
def test_mpirun_is_pointed_to_torchrun(name):
    with pytest.raises(LaunchError, match=rf"got mpirun \({name}=4\); start with `torchrun"):
        world_from_environment({name: "4"})
    assert world_from_environment({name: "1"}).size == 1


def test_submitit_local_task():
    environment = {
        "SUBMITIT_EXECUTOR": "local",
        "SUBMITIT_LOCAL_JOB_ID": "4321",
        "SUBMITIT_LOCAL_NTASKS": "2",
        "SUBMITIT_LOCAL_GLOBALID": "1",
        "SUBMITIT_LOCAL_LOCALID": "1",
    }
    world = world_from_environment(environment)
    assert world == World(1, 2, 1, 2, "127.0.0.1", 14321)
    assert world_from_environment(environment | {"SUBMITIT_LOCAL_NTASKS": "1"}).size == 1


@pytest.mark.parametrize(
    "nodelist, hosts",
    [
        ("node1", ["node1"]),
        ("nodeA,nodeB", ["nodeA", "nodeB"]),
        ("gpu5,node[1-2]", ["gpu5", "node1", "node2"]),
        ("n[1-2]-ib", ["n1-ib", "n2-ib"]),
        ("n[01-03,07]", ["n01", "n02", "n03", "n07"]),
        ("n[098-101]", ["n098", "n099", "n100", "n101"]),
        ("n[8-11]", ["n8", "n9", "n10", "n11"]),
        ("r[1-2]n[3,5],x", ["r1n3", "r1n5", "r2n3", "r2n5", "x"]),
        ("a[1].lab.org,b[2-3].lab.org", ["a1.lab.org", "b2.lab.org", "b3.lab.org"]),
    ],
)
def test_expand_nodelist(nodelist, hosts):
    assert expand_nodelist(nodelist) == hosts


@pytest.mark.parametrize("nodelist", ["", "n[1-2", "n1,,n2", "n[a-b]", "n[3-1]", "n[]", "n1]", "n 1"])
def test_expand_nodelist_refuses_what_it_does_not_understand(nodelist):
    with pytest.raises(LaunchError, match="expected a SLURM node list"):
        expand_nodelist(nodelist)


def test_error_for_a_short_task_list():
    with pytest.raises(LaunchError, match=r"tasks of node 1, got '5'"):
        world_from_environment(SLURM | {"SLURM_STEP_TASKS_PER_NODE": "5"})


def test_variables_are_those_of_torchrun():
    assert set(TORCHRUN_VARIABLES) == set(TORCHRUN)
