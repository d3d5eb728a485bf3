"""Under torchrun, from a checkout's folder: apply upstream's operations to real FSDP modules and print the results."""

import os
import sys
import warnings
from types import SimpleNamespace

import torch
import torch.distributed as dist

from tests.patches import stand_ins


def attempt(name, function):
    try:
        print(f"{name}: {function()}")
    except Exception as e:
        print(f"{name}: {type(e).__name__}: {e}")


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    sys.modules.update(stand_ins.modules())
    from dinov2.fsdp import FSDP, ShardingStrategy, reshard_fsdp_model
    from dinov2.train.ssl_meta_arch import SSLMetaArch

    dist.init_process_group("gloo")
    torch.cuda.synchronize = lambda: None
    networks = []
    for _ in range(4):
        options = {"sharding_strategy": ShardingStrategy.SHARD_GRAD_OP, "device_id": torch.device("cpu")}
        networks.append(FSDP(torch.nn.Linear(8, 8), use_orig_params=True, **options))
        with torch.no_grad():
            networks[-1](torch.ones(2, 8))
    gathered = networks[0]._handle.flat_param._full_param_padded.untyped_storage()

    def reshard():
        before = gathered.size()
        reshard_fsdp_model(networks[0])
        return f"{before} bytes gathered, {gathered.size()} after"

    def synchronize():
        student = torch.nn.ModuleDict({"backbone": networks[0], "dino_head": networks[1]})
        teacher = torch.nn.ModuleDict({"backbone": networks[2], "dino_head": networks[3]})
        arch = SimpleNamespace(student=student, teacher=teacher, need_to_synchronize_fsdp_streams=True)
        SSLMetaArch.fsdp_synchronize_streams(arch)
        shared = all(n._unshard_stream is networks[2]._unshard_stream for n in networks)
        return f"shared {shared}, needed again {arch.need_to_synchronize_fsdp_streams}"

    if dist.get_rank() == 0:
        attempt("reshard", reshard)
        attempt("synchronize", synchronize)
    dist.barrier()
    dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)  # the networks keep the group, whose threads must not meet Python's end
