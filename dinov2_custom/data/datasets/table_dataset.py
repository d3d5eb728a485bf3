"""Base class of both ImageNet datasets: optional .npy tables in the ``extra`` folder."""

from __future__ import annotations

import os
from functools import cached_property
from typing import Any

import numpy as np

from dinov2_custom.data.listing import PassedOver, log_passed_over
from dinov2_custom.data.sources import as_roots

from .extended import ExtendedVisionDataset


class TableDataset(ExtendedVisionDataset):
    """Images listed by the table "entries", memory-mapped from ``extra`` or else built by ``_make_entries``.

    Each row has at least class_index. The class ids come from the table "class-ids", or else from ``_make_class_ids``.
    """

    def __init__(self, root: str, extra: str | None, *transforms: Any) -> None:
        super().__init__(as_roots(root)[0], *transforms)
        self._extra_root = None if extra is None else as_roots(extra)[0]
        self._passed_over: list[PassedOver] = []

    def __getstate__(self) -> dict[str, Any]:
        """Exclude tables that are on disk; a worker process reopens them."""
        state = dict(self.__dict__)
        if self._extra_root is not None and os.path.isfile(self._table_path("entries")):
            state.pop("_entries", None)
        return state

    def _make_entries(self) -> np.ndarray:
        raise NotImplementedError

    def _make_class_ids(self) -> np.ndarray:
        raise NotImplementedError

    def _table_path(self, kind: str) -> str:
        return os.path.join(self._extra_root or "", f"{kind}.npy")

    def _load_table(self, kind: str) -> np.ndarray | None:
        if self._extra_root is None or not os.path.isfile(self._table_path(kind)):
            return None
        return np.load(self._table_path(kind), mmap_mode="r", allow_pickle=False)

    def _save_tables(self, **tables: np.ndarray) -> None:
        """Write tables into ``extra`` (``class_ids=`` is the table "class-ids") and use them from now on."""
        os.makedirs(self._extra_root, exist_ok=True)
        for name, table in tables.items():
            np.save(self._table_path(name.replace("_", "-")), table)
            self.__dict__.pop(f"_{name}", None)

    @cached_property
    def _entries(self) -> np.ndarray:
        table = self._load_table("entries")
        if table is None:
            table = self._make_entries()
            log_passed_over(self._passed_over)
        return table

    @cached_property
    def _class_ids(self) -> np.ndarray:
        table = self._load_table("class-ids")
        return self._make_class_ids() if table is None else table

    def find_class_id(self, class_index: int) -> str:
        return str(self._class_ids[class_index])

    def passed_over(self) -> list[PassedOver]:
        """Return what could not be listed when the table "entries" was built; empty for a table read from disk."""
        return self._passed_over

    def __len__(self) -> int:
        return len(self._entries)
