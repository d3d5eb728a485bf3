"""Tasks for the launcher tests that end in every possible way."""

import os
import signal
import time
from pathlib import Path

from dinov2_custom.errors import DataError
from dinov2_custom.run.submit import Task


class Misbehave(Task):
    """Write ``rank<r>`` files with the world size; then end rank ``args.who`` in the manner ``args.how``."""

    def __call__(self) -> int:
        rank, size = int(os.environ["RANK"]), os.environ["WORLD_SIZE"]
        out = Path(self.args.output_dir)
        (out / "logs").mkdir(parents=True, exist_ok=True)
        (out / "logs" / "log.txt").touch()
        (out / f"rank{rank}").write_text(f"{size} {os.environ['LOCAL_RANK']}")
        print(f"hello from rank {rank}", flush=True)
        if rank == self.args.who:
            if self.args.how == "crash":
                raise ValueError("an unexpected value")
            if self.args.how == "refuse":
                raise DataError("no such images")
            if self.args.how == "no torch":
                raise ModuleNotFoundError("No module named 'torch'", name="torch")
            if self.args.how == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            return int(self.args.how)
        time.sleep(1000 if self.args.wait else 0)
        return 0


class Listen(Task):
    """Write the world size, the rendezvous address and the non-loopback listening addresses to ``rank<r>``."""

    def __call__(self) -> int:
        import torch.distributed as dist

        from dinov2_custom import distributed

        with distributed.enabled():
            pids = [os.getpid(), os.getppid()]
            links = [
                os.readlink(link) for pid in pids for link in Path(f"/proc/{pid}/fd").glob("*") if link.is_symlink()
            ]
            mine = {link[8:-1] for link in links if link.startswith("socket:[")}
            rows = [
                row.split() for name in ("tcp", "tcp6") for row in Path(f"/proc/net/{name}").read_text().splitlines()
            ]
            open_to = {row[1].partition(":")[0] for row in rows if row[3] == "0A" and row[9] in mine}
            foreign = open_to - {"0100007F", "00000000000000000000000001000000", "0000000000000000FFFF00000100007F"}
            out = Path(self.args.output_dir)
            out.mkdir(parents=True, exist_ok=True)
            text = f"{dist.get_world_size()} {os.environ['MASTER_ADDR']} {foreign or ('ok' if open_to else 'none')}"
            (out / f"rank{dist.get_rank()}").write_text(text)
            dist.barrier()
        return 0


class CountSignals(Task):
    """Record signals for one second after the first one, then end as a stopped training run does."""

    def __call__(self) -> int:
        rank, out = int(os.environ["RANK"]), Path(self.args.output_dir)
        received: list[int] = []
        for signum in (signal.SIGINT, signal.SIGTERM):
            signal.signal(signum, lambda signum, frame: received.append(signum))
        out.mkdir(parents=True, exist_ok=True)
        (out / f"ready{rank}").touch()
        while not received:
            time.sleep(0.01)
        time.sleep(1)
        (out / f"signals{rank}").write_text(" ".join(map(str, received)))
        return 128 + received[0]
