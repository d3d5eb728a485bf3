"""Read W&B's offline files: ``run-<id>.wandb``, a sequence of checksummed protobuf records."""

import json
import struct
import zlib
from pathlib import Path
from types import SimpleNamespace

HEADER, BLOCK = 7, 32768
FULL, FIRST, _MIDDLE, LAST = 1, 2, 3, 4


def raw_records(data: bytes):
    """Yield the payload of every record; the layout is LevelDB's log with zlib's CRC."""
    assert data[:4] == b":W&B"
    position, parts = HEADER, []
    while position + 7 <= len(data):
        room = BLOCK - position % BLOCK
        if room < 7:
            position += room
            continue
        checksum, length, kind = struct.unpack_from("<IHB", data, position)
        payload = data[position + 7 : position + 7 + length]
        assert zlib.crc32(bytes([kind]) + payload) == checksum
        position += 7 + length
        parts = [payload] if kind in (FULL, FIRST) else [*parts, payload]
        if kind in (FULL, LAST):
            yield b"".join(parts)


def read_offline_run(file: Path) -> SimpleNamespace:
    """Return id, project, name, group, tags, config, summary, history (a dict per row), exit code (None: not ended)."""
    from wandb.proto import wandb_internal_pb2

    run = SimpleNamespace(config={}, summary={}, history=[], exit_code=None)
    for raw in raw_records(file.read_bytes()):
        record = wandb_internal_pb2.Record.FromString(raw)
        kind = record.WhichOneof("record_type")
        if kind == "run":
            run.id, run.project, run.name = record.run.run_id, record.run.project, record.run.display_name
            run.group, run.tags = record.run.run_group, list(record.run.tags)
            run.config |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
        elif kind == "config":
            run.config |= {item.key: json.loads(item.value_json) for item in record.config.update}
        elif kind == "summary":
            items = record.summary.update
            run.summary |= {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}
        elif kind == "history":
            items = record.history.item
            run.history.append({item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items})
        elif kind == "exit":
            run.exit_code = record.exit.exit_code
    return run
