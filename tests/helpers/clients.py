"""Read back what loggers wrote, without their own readers."""

from __future__ import annotations

import struct
import time
from pathlib import Path
from typing import Any

_BLOCK = 32768


def wandb_records(run_dir: str) -> list[Any]:
    """The records of an offline W&B run: a LevelDB log of protocol buffers."""
    from wandb.proto import wandb_internal_pb2

    (path,) = Path(run_dir).parent.glob("*.wandb")
    deadline = time.monotonic() + 20  # the service writes the last lines after `finish` returns
    while True:
        records = [wandb_internal_pb2.Record.FromString(chunk) for chunk in _chunks(path.read_bytes())]
        if any(record.HasField("exit") for record in records) or time.monotonic() > deadline:
            return records
        time.sleep(0.1)


def _chunks(data: bytes) -> list[bytes]:
    position, chunks, partial = 7, [], b""  # seven bytes of file header
    while position + 7 <= len(data):
        left = _BLOCK - position % _BLOCK
        if left < 7:
            position += left
            continue
        _, length, kind = struct.unpack("<IHB", data[position : position + 7])
        if kind == 0:
            position += left
            continue
        if position + 7 + length > len(data):
            break  # being written
        partial += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # a full record, or the last part of one
            chunks.append(partial)
            partial = b""
    return chunks
