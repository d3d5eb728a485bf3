import sys
from types import ModuleType, SimpleNamespace

import torch

from benchmarks import gpu


def test_an_engine_that_fails_is_a_row(capsys):
    def fails():
        raise ValueError("no kernel")

    def runs_out():
        raise torch.cuda.OutOfMemoryError("")

    for run, said in ((fails, "failed: ValueError"), (runs_out, "out of memory")):
        cells = gpu._cells(run, 4, 1.0)
        assert cells[0] == said and len(cells) == len(gpu.HEADER) - 3
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
    page = gpu._page(args, [row], state)
    assert f"* xformers: {state}.\n" in page and "| no xformers here | - |" in page
