"""Program of each of two processes for ``test_upstream_shards.py``: ``python -m tests.export.upstream_fsdp <folder>``.

Upstream's model, wrapped by upstream's own function with torch's FSDP1, is saved as upstream's checkpointer does: by
each process, as LOCAL_STATE_DICT. Only what needs a GPU is replaced: the device, and the broadcast of states.
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from omegaconf import OmegaConf
from torch.distributed.fsdp import FullyShardedDataParallel, StateDictType

from tests.oracle import ensure_oracle, load_oracle
from tests.oracle.trainer import oracle_config, reduced_depth

DEPTH = 3
OVERRIDES = [
    "student.arch=vit_small",
    "student.patch_size=14",
    "crops.global_crops_size=28",
    "crops.local_crops_size=14",
    "student.block_chunks=2",
    "dino.head_n_prototypes=41",  # odd, as no number of processes divides it
    "dino.head_hidden_dim=47",
    "dino.head_bottleneck_dim=21",
    "ibot.separate_head=true",
    "ibot.head_n_prototypes=23",
    "ibot.head_hidden_dim=33",
    "ibot.head_bottleneck_dim=17",
]


def main(folder: Path) -> None:
    dist.init_process_group("gloo")
    rank, oracle = dist.get_rank(), load_oracle(ensure_oracle())
    oracle.distributed._LOCAL_RANK, oracle.distributed._LOCAL_WORLD_SIZE = rank, dist.get_world_size()
    for strategy in ("SHARD_GRAD_OP", "FULL_SHARD"):
        for use_orig_params in (True, False):
            save(oracle, folder / f"{strategy}_{use_orig_params}", strategy, use_orig_params)
    dist.destroy_process_group()


def save(oracle, folder: Path, strategy: str, use_orig_params: bool) -> None:
    """Write config.yaml, expected.pth, and this process's file of a checkpoint."""
    rank = dist.get_rank()

    def on_cpu(module, **options):
        options |= {"device_id": torch.device("cpu"), "sync_module_states": False, "use_orig_params": use_orig_params}
        return FullyShardedDataParallel(module, **options)

    oracle.fsdp.FSDP = on_cpu
    folder.mkdir(exist_ok=True, parents=True)
    cfg = oracle_config(oracle, OVERRIDES)
    torch.manual_seed(0)
    with reduced_depth(oracle.vits, DEPTH):
        model = oracle.arch.SSLMetaArch(cfg)
    if rank == 0:
        OmegaConf.save(cfg, folder / "config.yaml")
        torch.save(model.teacher.state_dict(), folder / "expected.pth")
    for network, section in ((model.student, "student"), (model.teacher, "teacher")):
        for name in network:
            precision = cfg.compute_precision[section][name]
            precision.sharding_strategy = strategy
            wrap = oracle.fsdp.get_fsdp_wrapper(precision, modules_to_wrap={oracle.arch.BlockChunk})
            network[name] = wrap(network[name])
    with FullyShardedDataParallel.state_dict_type(model, StateDictType.LOCAL_STATE_DICT):
        state = model.state_dict()
    name = f"model_0003749.rank_{rank}.pth"
    torch.save({"model": state, "optimizer": {"state": {}}, "iteration": 3749}, folder / name)
    (folder / f"last_checkpoint.rank_{rank}").write_text(name)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
