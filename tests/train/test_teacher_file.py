import torch

from tests.processes import launch_source

TWO = '''
import sys, torch
from pathlib import Path
from dinov2_custom import distributed, parallel
from dinov2_custom.train.memory import LiveBytes
from dinov2_custom.train.ssl_meta_arch import SSLMetaArch
from dinov2_custom.train.teacher_file import save_teacher
from tests.train.batches import tiny_config
class NewBytes(LiveBytes):
    """Without views of what the model holds, and sharded tensors, which pass for one of their whole size."""

    def __init__(self, held):
        super().__init__()
        self.held = {parallel.own_share(tensor).untyped_storage().data_ptr() for tensor in held}

    def _add_all(self, result):
        if type(result) is torch.Tensor and result.untyped_storage().data_ptr() not in self.held:
            super()._add_all(result)

folder = Path(sys.argv[1])
distributed.enable()
rank, results = distributed.get_global_rank(), {}
for strategy in ("NO_SHARD", "FULL_SHARD"):
    parts = [f"compute_precision.{m}.{p}" for m in ("student", "teacher") for p in ("backbone", "dino_head")]
    cfg = tiny_config(*(f"{part}.sharding_strategy={strategy}" for part in parts))
    model = SSLMetaArch(cfg)
    expected = {name: tensor.clone() for name, tensor in model.teacher.state_dict().items()}
    parallel.parallelize(cfg, model)
    with NewBytes(model.state_dict().values()) as live:
        path = save_teacher(model, folder / strategy, "x")
    results[strategy] = {"peak": sum(live.at_peak.values()), "expected": expected, "path": str(path)}
torch.save(results, folder / f"{rank}.pt")
distributed.disable()
'''


def test_main_process_holds_the_teacher_and_others_one_tensor_at_a_time(tmp_path):
    launch_source(tmp_path, TWO, str(tmp_path))
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    for strategy, here in first.items():
        written = torch.load(here["path"], weights_only=True)["teacher"]
        assert written.keys() == here["expected"].keys()
        for name, tensor in here["expected"].items():
            assert torch.equal(written[name], tensor), name
            assert written[name].untyped_storage().nbytes() == tensor.nbytes
        whole, largest = (of(t.nbytes for t in written.values()) for of in (sum, max))
        assert here["peak"] <= 2 * whole and second[strategy]["peak"] <= 2 * largest < whole / 2
    assert first["NO_SHARD"]["peak"] == 0  # in host memory already
