"""Program of each of two processes in ``test_distributed.py``: run as ``python -m tests.two_processes <folder>``."""

import json
import logging
import os
import sys
from pathlib import Path

import torch
from omegaconf import OmegaConf

from dinov2_custom import distributed, entry
from dinov2_custom.logging import MetricLogger, setup_logging
from dinov2_custom.utils.config import write_config


def main(folder: Path) -> None:
    distributed.enable()
    distributed.enable()  # the environment is unchanged: no effect
    distributed.enable(overwrite=True)
    rank = distributed.get_global_rank()
    facts = {
        "rank": rank,
        "size": distributed.get_global_size(),
        "local_rank": distributed.get_local_rank(),
        "local_size": distributed.get_local_size(),
        "main": distributed.is_main_process(),
        "exported": os.environ.get("WORLD_SIZE"),
        "sum": distributed.all_reduce(torch.tensor([rank + 1.0])).item(),
        "mean": distributed.all_reduce(torch.tensor([rank + 1.0]), average=True).item(),
        "object": distributed.broadcast_object({"from": rank}),
    }
    setup_logging(folder)
    logging.getLogger("dinov2").info(f"hello from rank {rank}")
    print(f"print of rank {rank}", flush=True)
    metrics = MetricLogger(output_file=folder / "training_metrics.json")
    for loss in (1.0, 2.0):
        metrics.update(loss=torch.tensor(loss + 10 * rank))
    metrics.dump_in_output_file(iteration=1, iter_time=0.5, data_time=0.25)
    metrics.synchronize_between_processes()
    facts["global_avg"], facts["window_median"] = metrics.loss.global_avg, metrics.loss.median
    write_config(OmegaConf.create({"rank": rank}), folder)
    distributed.barrier()
    distributed.disable()
    facts["after"] = [distributed.is_enabled(), distributed.get_global_size(), os.environ.get("WORLD_SIZE")]
    (folder / f"facts{rank}.json").write_text(json.dumps(facts))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    entry.leave(0)
