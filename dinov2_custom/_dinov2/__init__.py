"""Installed as the package ``dinov2``: ``import dinov2.x.y`` returns the module object ``dinov2_custom.x.y`` itself,
or the one that ``_ELSEWHERE`` names.

So upstream's imports keep working and no module is loaded twice. Under any name other than ``dinov2`` this
file does nothing. Read :class:`_AliasFinder` first.
"""

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys

_REAL = "dinov2_custom"
_ELSEWHERE = {"fsdp": "compat.fsdp"}  # upstream's module -> the module here


class _AliasFinder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Resolve ``dinov2.<name>`` to the module of :func:`_real_name`."""

    def find_spec(self, fullname, path=None, target=None):
        if not fullname.startswith("dinov2."):
            return None
        real = importlib.util.find_spec(_real_name(fullname))
        if real is None:
            return None
        is_package = real.submodule_search_locations is not None
        return importlib.machinery.ModuleSpec(fullname, self, origin=real.origin, is_package=is_package)

    def create_module(self, spec):
        module = importlib.import_module(_real_name(spec.name))
        spec.loader_state = module.__spec__  # the import system will replace it with the alias's spec
        return module

    def exec_module(self, module):
        module.__spec__ = module.__spec__.loader_state

    def get_code(self, fullname):  # for `python -m dinov2.x`
        real = importlib.util.find_spec(_real_name(fullname))
        return real.loader.get_code(real.name)


def _real_name(alias):
    name = alias.removeprefix("dinov2.")
    return f"{_REAL}.{_ELSEWHERE.get(name, name)}"


if __name__ == "dinov2":
    sys.meta_path.insert(0, _AliasFinder())
    sys.modules[__name__] = importlib.import_module(_REAL)
