"""Rules of the code base: permitted imports, no work at import, no patched packages.

Every check is a function of source text, also tested on a bad example. A new module must be added to ``ALLOWED`` or
``SATELLITES``.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from dinov2_custom.errors import command_name

REPOSITORY = Path(__file__).resolve().parents[1]
PACKAGE = "dinov2_custom"
FILES = sorted((REPOSITORY / PACKAGE).rglob("*.py"))
SCRIPTS = sorted((REPOSITORY / "run").rglob("*.py"))
MAX_SCRIPT_LINES = 9

BASE = {"errors", "files", "utils.dtype", "utils.rng", "utils.schedules", "utils.transfer"}
# unit -> the units it may import, besides itself and the package's version; a unit is a module or a package
ALLOWED = {
    "errors": set(),
    "files": {"errors"},
    "utils": set(),
    "utils.dtype": set(),
    "utils.rng": set(),
    "utils.schedules": set(),
    "utils.transfer": set(),
    "utils.cluster": set(),
    "utils.param_groups": set(),
    "utils.download": {"errors", "files", "utils.paths"},
    "utils.hugging_face": {"errors"},
    "utils.paths": {"errors"},
    "utils.weights": {"utils.paths", "utils.run_folder", "errors", "files"}
    | {"utils.checkpoint_folder", "utils.download", "utils.hugging_face"},
    "utils.run_folder": {"errors", "utils.paths"},
    "utils.checkpoint_folder": {"errors", "files", "utils.run_folder"},
    "utils.utils": BASE | {"teacher", "utils.weights"},  # load_pretrained_weights, by upstream's name
    "world": {"errors"},
    "entry": {"errors", "world"},
    "distributed": {"errors", "world"},
    "configs": {"errors"},
    "logging": {"errors", "files", "distributed", "utils.paths"},
    "utils.config": BASE | {"configs", "distributed", "logging", "utils.utils"},
    "layers": BASE,
    "models": BASE | {"layers"},
    "loss": BASE | {"distributed", "layers"},
    "data": BASE | {"world"},
    "sharding": BASE | {"distributed"},
    "parallel": BASE | {"distributed", "configs", "sharding"},
    "reading": BASE | {"configs", "data", "distributed"},
    "teacher": BASE
    | {"configs", "reading", "distributed", "models", "utils.paths", "utils.run_folder", "utils.weights"},
    "cli": {"errors", "entry", "configs", "decoder.settings"},  # command lines, parsed without torch
    "__main__": {"cli"},
    "eval.args": {"cli"},
    # labelled images, their features and neighbours, which training uses too; without commands and checkpoints
    "eval.datasets": BASE | {"data", "distributed", "reading"},
    "eval.utils": BASE | {"data", "distributed"},
    "eval.neighbours": BASE | {"data", "distributed", "eval.datasets", "eval.utils"},
    "decoder.settings": {"errors", "configs"},
    "run": {"errors", "world", "entry", "cli", "configs", "utils.cluster", "utils.run_folder", "eval.args"}
    | {"decoder.settings"},
    "_dinov2": set(),
}
ALLOWED["train"] = set(ALLOWED) - {"run", "_dinov2"}
SATELLITES = {"compat", "eval", "hub", "export", "plan", "verify", "plots", "embed", "patching", "decoder"}
ALLOWED |= {satellite: set(ALLOWED) - {"_dinov2"} for satellite in SATELLITES}
ALLOWED["plots"] |= {"plan"}  # prices of a forecast
ALLOWED["prepare"] = ALLOWED["verify"] | {"verify"}  # what is written again is checked first
ALLOWED["export"] = ALLOWED["export"] | {"plots"}  # the model card has a picture of the loss
ALLOWED["decoder"] = ALLOWED["verify"] | {"export", "plots"}  # a backbone goes to transformers as its export does
# a demonstration of everything: uses the satellites, nothing uses it
ALLOWED["quickstart"] = set(ALLOWED) - {"_dinov2"}
ALLOWED["api"] = set(ALLOWED) - {"_dinov2"}  # the commands as functions
LAZY_ONLY = {("run", "train"), ("run", "eval")}  # allowed inside a function: the node imports it, not who submits

TORCH_FREE = [
    "errors",
    "cli",
    "__main__",
    "entry",
    "world",
    "configs",
    "configs.load",
    "utils.rng",
    "utils.cluster",
    "utils.run_folder",
    "run.submit",
    "run.process",
    "run.requeue",
    "run.train.train",
    "run.eval.knn",
    "run.eval.linear",
    "run.eval.log_regression",
    "run.embed",
    "run.decoder.train",
    "decoder.settings",
    "eval.args",
    "plots.history",
    "patching.main",
]
# who may rename or lock besides files.py: folders, files of former runs, and what a library wrote by itself
RENAMES = {"files", "train.checkpoint_store", "export.write", "run.process"}
WORK = {
    "os.getenv", "os.environ", "os.makedirs", "os.mkdir", "os.uname", "torch.manual_seed", "torch.set_default_dtype",
    "torch.set_num_threads", "torch.cuda.is_available", "torch.cuda.device_count", "torch.set_float32_matmul_precision",
    "random.seed", "np.random.seed", "numpy.random.seed", "logging.basicConfig", "logging.captureWarnings",
    "warnings.filterwarnings", "warnings.simplefilter", "print", "open", "sys.path",
    "subprocess.run", "subprocess.check_output",
}  # fmt: skip
# attributes of other packages, and of Python, that these document as there to be set
SETTINGS = {
    "torch.backends.cudnn.allow_tf32",
    "torch.backends.cuda.matmul.allow_tf32",
    "PIL.Image.MAX_IMAGE_PIXELS",
    "sys.argv",
    "sys.modules[__name__].__class__",
}


def _name(file: Path) -> str:
    """``dinov2_custom/a/b.py`` -> ``a.b``; ``dinov2_custom/a/__init__.py`` -> ``a``."""
    parts = file.relative_to(REPOSITORY / PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {_name(file): file for file in FILES}


def _imports(tree: ast.AST, module: str, is_package: bool) -> Iterator[tuple[str, bool]]:
    """Yield (absolute dotted name, whether inside a function) of every import, without those under TYPE_CHECKING."""
    for node, in_function in _walk(tree, False):
        if isinstance(node, ast.Import):
            yield from ((alias.name, in_function) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            source = node.module or ""
            if node.level:
                parents = f"{PACKAGE}.{module}".split(".")
                parents = parents[: len(parents) - node.level + is_package]
                source = ".".join([*parents, *source.split(".")]).rstrip(".")
            yield from ((f"{source}.{alias.name}", in_function) for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "find_spec")):
            if node.args and isinstance(node.args[0], ast.Constant):
                yield str(node.args[0].value), in_function


def _walk(node: ast.AST, in_function: bool) -> Iterator[tuple[ast.AST, bool]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        yield child, in_function
        inside = in_function or isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        yield from _walk(child, inside)


def _own_module(imported: str) -> str | None:
    """``dinov2_custom.a.b.name`` -> ``a.b``, the longest part that is a module; None for what is not ours."""
    parts = imported.split(".")
    if parts[0] != PACKAGE:
        return None
    parts = parts[1:]
    while parts and ".".join(parts) not in MODULES:
        parts.pop()
    return ".".join(parts)


def _unit(module: str) -> str:
    units = [unit for unit in ALLOWED if module == unit or module.startswith(unit + ".")]
    return max(units, key=len, default="")


def forbidden_imports(source: str, module: str, is_package: bool = False) -> list[str]:
    """Return what ``module`` imports of ours against the table."""
    unit, found = _unit(module), []
    for imported, in_function in _imports(ast.parse(source), module, is_package):
        own = _own_module(imported)
        target = _unit(own) if own else ""
        if not target or target == unit or target in ALLOWED.get(unit, set()) or (unit == "utils" and own == "utils"):
            continue
        if not (in_function and (unit, target) in LAZY_ONLY):
            found.append(imported)
    return found


def third_party(source: str, module: str = "") -> set[str]:
    """Return the top-level names that ``source`` imports anywhere."""
    return {imported.split(".")[0] for imported, _ in _imports(ast.parse(source), module, False)}


def work_at_import(source: str) -> list[str]:
    """Return calls and accesses of ``WORK`` that run when the module is imported."""
    found = []

    def look(node: ast.AST) -> None:
        if isinstance(node, ast.If) and "__main__" in ast.unparse(node.test):
            return
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            outer = [*getattr(node, "decorator_list", []), *node.args.defaults, *filter(None, node.args.kw_defaults)]
            for part in outer:
                look(part)
            return
        if isinstance(node, (ast.Attribute, ast.Name)) and ast.unparse(node) in WORK:
            found.append(f"line {node.lineno}: {ast.unparse(node)}")
        for child in ast.iter_child_nodes(node):
            look(child)

    look(ast.parse(source))
    return found


def patched(source: str) -> list[str]:
    """Return the attributes of other packages that ``source`` assigns or deletes, except ``SETTINGS``."""
    tree, others = ast.parse(source), {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            others |= {one.asname or one.name.split(".")[0]: one.name if one.asname else None for one in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            others |= {one.asname or one.name: f"{node.module}.{one.name}" for one in node.names}

    def full_name(node: ast.AST) -> str:
        first, dot, rest = ast.unparse(node).partition(".")
        is_name = isinstance(node, (ast.Attribute, ast.Name)) and first in others
        return f"{others[first] or first}{dot}{rest}" if is_name else PACKAGE

    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, (ast.Store, ast.Del)):
            found.append((node.lineno, full_name(node)))
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("setattr", "delattr"):
            found.append((node.lineno, f"{full_name(node.args[0])} by {ast.unparse(node.func)}"))
    found = [(line, name) for line, name in found if not name.startswith(PACKAGE) and name not in SETTINGS]
    return [f"line {line}: {name}" for line, name in sorted(found)]


def circles(imports: dict[str, set[str]]) -> set[frozenset[str]]:
    """Return the sets of modules that import each other, directly or through others."""

    def reach(start: str) -> set[str]:
        found: set[str] = set()
        left = [start]
        while left:
            for target in imports.get(left.pop(), set()) - found:
                found.add(target)
                left.append(target)
        return found

    reached = {name: reach(name) for name in imports}
    groups = {frozenset(b for b in reached[a] if a in reached.get(b, ())) for a in imports if a in reached[a]}
    return groups


def renames_and_locks(source: str) -> list[str]:
    """Return calls that rename (os.replace, os.rename, Path.replace, Path.rename) or lock (flock, lockf, filelock)."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            name, on = node.func.attr, ast.unparse(node.func.value)
            is_path = name in ("replace", "rename") and len(node.args) == 1 and not node.keywords  # str.replace has two
            if is_path or (on == "os" and name in ("replace", "rename", "renames")) or name in ("flock", "lockf"):
                found.append(f"line {node.lineno}: {on}.{name}")
    return found + [f"imports {name}" for name in third_party(source) & {"fcntl", "filelock", "msvcrt"}]


def _loaded_by(module: str, seen: set[str]) -> set[str]:
    """Return the third-party names that importing ``module`` imports, through our modules and their packages."""
    names: set[str] = set()
    parts = module.split(".")
    for own in [".".join(parts[:n]) for n in range(len(parts) + 1)]:
        if own in seen or own not in MODULES:
            continue
        seen.add(own)
        file = MODULES[own]
        for imported, in_function in _imports(ast.parse(file.read_text()), own, file.name == "__init__.py"):
            if not in_function:
                target = _own_module(imported)
                names |= {imported.split(".")[0]} if target is None else _loaded_by(target, seen)
    return names


# one test for all files: a test for each would take longer than what it does


def test_every_module_has_a_row_in_the_table():
    assert [name for name in MODULES if name and not _unit(name)] == [], "place it in ALLOWED or SATELLITES"


def test_imports_follow_the_table():
    found = {n: forbidden_imports(f.read_text(), n, f.name == "__init__.py") for n, f in MODULES.items()}
    assert {name: bad for name, bad in found.items() if bad} == {}


def test_no_work_at_import():
    found = {name: work_at_import(file.read_text()) for name, file in MODULES.items()}
    assert {name: bad for name, bad in found.items() if bad} == {}


def test_no_other_package_is_patched():
    found = {name: patched(file.read_text()) for name, file in MODULES.items()}
    assert {name: bad for name, bad in found.items() if bad} == {}


def test_no_modules_import_each_other():
    """This includes imports inside functions."""
    imports: dict[str, set[str]] = {}
    for name, file in MODULES.items():
        found = _imports(ast.parse(file.read_text()), name, file.name == "__init__.py")
        imports[name] = {own for imported, _ in found if (own := _own_module(imported)) and own != name}
    assert circles(imports) == set()


def test_circle_check_sees():
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b", "d"}, "d": set()}) == {frozenset("bc")}
    assert circles({"a": {"b"}, "b": {"c"}, "c": set()}) == set()


def test_files_are_renamed_and_locked_in_one_module():
    found = {name: renames_and_locks(file.read_text()) for name, file in MODULES.items()}
    assert {name for name, calls in found.items() if calls} == RENAMES


def test_only_the_backend_imports_xformers_and_no_module_torchvision():
    users = {name: third_party(file.read_text(), name) for name, file in MODULES.items()}
    assert {name for name, used in users.items() if "xformers" in used} <= {"layers.backend"}
    assert {name for name, used in users.items() if "torchvision" in used} == set()


@pytest.mark.parametrize("module", TORCH_FREE)
def test_torch_free(module):
    assert module in MODULES
    assert "torch" not in _loaded_by(module, set())


@pytest.mark.parametrize("file", SCRIPTS, ids=lambda file: str(file.relative_to(REPOSITORY)))
def test_scripts_hold_no_logic(file):
    source = file.read_text()
    assert len(source.splitlines()) <= MAX_SCRIPT_LINES
    assert f'main("{command_name(str(file))}")' in source and "sys.path" not in source
    assert not third_party(source) & {"torch", "torchvision", "xformers"}


@pytest.mark.parametrize(
    "module, source, bad",
    [
        ("layers.mlp", "from dinov2_custom.configs import load_config", ["dinov2_custom.configs.load_config"]),
        ("layers.mlp", "from ..configs import load_config", ["dinov2_custom.configs.load_config"]),
        ("layers.mlp", "def f():\n    from dinov2_custom import distributed", ["dinov2_custom.distributed"]),
        ("data.collate", "import dinov2_custom.logging", ["dinov2_custom.logging"]),
        ("errors", "from dinov2_custom.utils.rng import seed_for", ["dinov2_custom.utils.rng.seed_for"]),
        ("train.train", "from dinov2_custom.eval import knn", ["dinov2_custom.eval.knn"]),
        ("plots", "import importlib\nimportlib.import_module('dinov2_custom.eval')", ["dinov2_custom.eval"]),
        ("run.submit", "from dinov2_custom.train import main", ["dinov2_custom.train.main"]),
        ("run.submit", "def f():\n    from dinov2_custom.train import main", []),
        ("eval.knn", "from dinov2_custom.train.train import main\nfrom . import metrics", []),
        ("layers.mlp", "if TYPE_CHECKING:\n    from dinov2_custom import configs", []),
        ("train.startup", "from dinov2_custom import __version__, distributed", []),
    ],
)
def test_import_check_sees(module, source, bad):
    assert forbidden_imports(source, module) == bad


@pytest.mark.parametrize(
    "source, bad",
    [
        ("import os\nHOME = os.environ['HOME']", ["line 2: os.environ"]),
        ("def f(x=os.getenv('A')): pass", ["line 1: os.getenv"]),
        ("class A:\n    torch.manual_seed(0)", ["line 2: torch.manual_seed"]),
        ("if True:\n    sys.path.insert(0, 'x')", ["line 2: sys.path"]),
        ("def f():\n    return os.environ['HOME']", []),
        ("if __name__ == '__main__':\n    print(1)", []),
    ],
)
def test_work_check_sees(source, bad):
    assert work_at_import(source) == bad


@pytest.mark.parametrize(
    "source, bad",
    [
        ("import torch.distributed as dist\na, dist.f = dist.f, 1", ["line 2: torch.distributed.f"]),
        ("import torch\ndef f():\n    torch.nn.Linear.forward = 1", ["line 3: torch.nn.Linear.forward"]),
        ("from PIL import Image\ndel Image.open", ["line 2: PIL.Image.open"]),
        ("import warnings\nsetattr(warnings, name, 1)", ["line 2: warnings by setattr"]),
        ("from PIL import Image\nImage.MAX_IMAGE_PIXELS = None", []),
        ("from dinov2_custom.layers import backend\nbackend.attention = 1", []),
        ("import torch\nx = torch.ones(1)\nx.grad = None\nself.torch.x = 1", []),
    ],
)
def test_patching_check_sees(source, bad):
    assert patched(source) == bad


@pytest.mark.parametrize(
    "source, bad",
    [
        ("os.replace(a, b)", ["line 1: os.replace"]),
        ("def f(p):\n    p.with_suffix('').rename(p)", ["line 2: p.with_suffix('').rename"]),
        ("'a'.replace('a', 'b'); t._replace(x=1)", []),
        ("def f():\n    import fcntl\n    fcntl.flock(1, 2)", ["line 3: fcntl.flock", "imports fcntl"]),
        ("from filelock import FileLock", ["imports filelock"]),
    ],
)
def test_rename_check_sees(source, bad):
    assert renames_and_locks(source) == bad


def test_torch_check_sees():
    assert "torch" in _loaded_by("layers.mlp", set())
    assert third_party("def f():\n    import xformers.ops") == {"xformers"}
