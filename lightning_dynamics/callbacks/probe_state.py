"""How copied batches survive a resume: in the checkpoint if small and plain, else in files beside the records."""

from __future__ import annotations

import hashlib
import io
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_dynamics.callbacks.map_style import ProbeItem, share_batches, share_pieces
from lightning_dynamics.callbacks.ranks import Ranks
from lightning_dynamics.objective.replay import tensor_bytes

_SMALL = 1 << 24  # bytes of batches, over all ranks, that go into a checkpoint


def keep_batches(items: Sequence[ProbeItem], ranks: Ranks, directory: Path | None) -> dict[str, Any]:
    """What a checkpoint has to keep of copied batches; called once on every rank, when they are complete.

    A checkpoint holds rank zero's state alone, so that rank's copy must know of all: plain batches are exchanged,
    others are written to a file by the rank that holds them, and their digests are exchanged.

    Args:
        items: This rank's batches.
        ranks: The ranks.
        directory: Where files may be written, on rank zero; None if nothing may be written.
    """
    directory = ranks.share(directory)
    total = sum(ranks.gather(sum(tensor_bytes(item.batch) for item in items)))
    plain = all(ranks.gather(all(_is_plain(item.batch) for item in items)))
    if plain and total <= _SMALL:
        shared = ranks.gather([(item.index, item.weight, item.batch) for item in items])
        entries = sorted((entry for part in shared for entry in part), key=lambda entry: entry[0])
        return {"batches": [{"index": i, "weight": w, "batch": batch} for i, w, batch in entries]}
    if directory is None:
        return {}
    buffer = io.BytesIO()
    file: Path | None = None
    try:
        torch.save([(item.index, item.weight, item.batch) for item in items], buffer)
        directory.mkdir(parents=True, exist_ok=True)
        digest = hashlib.sha256(buffer.getvalue()).hexdigest()
        file = directory / f"dynamics-probe-{digest[:12]}-rank{ranks.rank}.pt"
        file.write_bytes(buffer.getvalue())
    except Exception as error:
        file = None
        warnings.warn(
            f"The probe's batches cannot be kept for a resume ({error!r}): a resumed run will measure on others.",
            stacklevel=2,
        )
    files = ranks.gather(None if file is None else [str(file), digest])
    return {} if None in files else {"files": files}


def restore_batches(
    kept: Mapping[str, Any], rank: int, world_size: int, pieces: int | None = None
) -> list[ProbeItem] | None:
    """This rank's share of the batches that :func:`keep_batches` kept; None if a file is gone or not what it was.

    Args:
        kept: What was kept.
        rank: This process's number.
        world_size: Number of processes.
        pieces: Consecutive batches that make one drawn mini-batch, of which every rank has a share; None if nothing is
            drawn.
    """
    if "batches" in kept:
        entries = [(entry["index"], entry["weight"], entry["batch"]) for entry in kept["batches"]]
    else:
        entries = []
        for name, digest in kept["files"]:
            try:
                content = Path(name).read_bytes()
            except OSError:
                return None
            if hashlib.sha256(content).hexdigest() != digest:
                return None
            # the file's content is what this run wrote: its digest came with the checkpoint
            entries += torch.load(io.BytesIO(content), weights_only=False)
        entries.sort(key=lambda entry: entry[0])
    shares = (
        share_batches(len(entries), rank, world_size)
        if pieces is None
        else share_pieces(len(entries) // pieces, pieces, rank, world_size)
    )
    return [
        ProbeItem(entries[i][2], entries[i][0], is_ready=True, weight=entries[i][1] if counts else 0.0)
        for i, counts in shares
    ]


def _is_plain(thing: Any) -> bool:
    """Whether a checkpoint that is loaded with ``weights_only=True`` can hold it."""
    if type(thing) is Tensor or thing is None or isinstance(thing, (bool, int, float, str)):
        return True
    if type(thing) in (list, tuple):
        return all(_is_plain(member) for member in thing)
    return type(thing) is dict and all(isinstance(k, (str, int)) and _is_plain(v) for k, v in thing.items())
