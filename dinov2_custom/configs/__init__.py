"""Configuration of a run. Heavy packages are imported only when a name is used.

The keys are declared in schema.py; load.py loads and checks a configuration. Upstream's names `dinov2_default_config`,
`load_config` and `load_and_merge_config` are available here.
"""

from typing import Any

__all__ = ["dinov2_default_config", "load_and_merge_config", "load_config"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from dinov2_custom.configs import load

    value = load.default_config() if name == "dinov2_default_config" else getattr(load, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
