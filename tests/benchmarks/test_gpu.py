import sys
from types import ModuleType, SimpleNamespace

import torch

from benchmarks import gpu
from dinov2_custom.eval.utils import ModelWithNormalize
from dinov2_custom.train.ssl_meta_arch import SSLMetaArch
from tests.data.pictures import make_folder
from tests.train.batches import TINY


def test_an_engine_that_fails_is_a_row(capsys):
    def fails():
        raise ValueError("no kernel")

    def runs_out():
        raise torch.cuda.OutOfMemoryError("")

    for run, said in ((fails, "failed: ValueError"), (runs_out, "out of memory")):
        cells = gpu._cells(run, 4, 1.0)
        assert cells[0] == said and len(cells) == len(gpu.HEADER) - 3
        cells = gpu._evaluation_cells(run)
        assert cells[0] == said and len(cells) == len(gpu.EVALUATION) - 3
    assert "no kernel" in capsys.readouterr().err


def test_the_page_says_why_xformers_did_not_load(monkeypatch, tmp_path):
    library, ops = ModuleType("xformers._cpp_lib"), ModuleType("xformers.ops")
    library._cpp_library_load_exception = OSError("libcudart.so.12: cannot open shared object file")
    for name, module in (("xformers", ModuleType("xformers")), (library.__name__, library), (ops.__name__, ops)):
        monkeypatch.setitem(sys.modules, name, module)
    usable, state = gpu.xformers_state()
    assert not usable and "libcudart.so.12" in state
    args = SimpleNamespace(files=8, workers=1, repetitions=2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a card")
    row = ["vit_small", 4, "upstream, autocast", "no xformers here", *["-"] * 5]
    page = gpu._page(args, [row], state, [["vit_small", 4, "with kNN", "9", "7", "2"]])
    assert "| with kNN | 9 | 7 | 2 |" in page
    assert f"* xformers: {state}.\n" in page and "| no xformers here | - |" in page


def test_an_evaluation_and_its_forward_passes_are_measured(monkeypatch, tmp_path):
    """On this CPU, with the same number of passes of both kinds in the evaluation and alone."""
    make_folder(tmp_path, [f"{i % 2}/{i}.png" for i in range(6)], 20, 20)
    sizes = []
    for owner, name in ((SSLMetaArch, "evaluate"), (ModelWithNormalize, "forward")):
        original = getattr(owner, name)

        def counted(self, images, *args, original=original):
            sizes.append(len(images["collated_global_crops"] if isinstance(images, dict) else images))
            return original(self, images, *args)

        monkeypatch.setattr(owner, name, counted)
    whole, passes = gpu.measure_evaluation([*TINY], tmp_path, 0, knn=True, device="cpu", pause_s=0)
    assert whole > 0 and passes > 0
    each = [8, 8, 6]  # two batches of two crops of four images, and all images for kNN
    runs = 1 + gpu.BLOCKS
    assert sizes == [*each, 6] + each * 2 * runs  # the start's with raw pixels
