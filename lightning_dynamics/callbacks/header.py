"""What a record says of the run that it belongs to, and what must not come into it: secrets."""

from __future__ import annotations

import dataclasses
import math
import os
import platform
import re
import time
from argparse import Namespace
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from enum import Enum
from pathlib import PurePath
from types import SimpleNamespace
from typing import Any

import lightning
import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer

import lightning_dynamics

_SECRET = re.compile(r"key|token|secret|passw|credential|auth", re.IGNORECASE)
"""How things are called whose values are nobody's business."""

_TOKEN = re.compile(
    r"\b(?:gh[opsur]_\w{20,}|github_pat_\w{20,}|glpat-[\w-]{16,}|hf_\w{20,}|sk-[\w-]{20,}|AKIA[0-9A-Z]{16}"
    r"|xox[abeoprs]-[\w-]{10,}|eyJ[\w-]{10,}\.[\w-]{10,}\.[\w-]*)|-----BEGIN [A-Z ]*PRIVATE KEY"
)
"""What access tokens and private keys look like, whatever they are called."""

_USER = re.compile(r"([a-z][a-z0-9+.-]*://)(?:[^/?#\s]*@|[^/?#\s:]*:(?!\d+(?:[/?#\s]|$))\S*@)", re.IGNORECASE)
"""User and password in an address, also where the password is not encoded."""

_GIVEN = re.compile(
    r"([\w-]*(?:key|token|secret|passw|credential|auth)[\w-]*=|[?&][\w-]*sig[\w-]*=|\bbearer\s+(?=\S{16}))[^\s&;,#]+",
    re.IGNORECASE,
)
"""A secret that a text gives a name to: an option, a parameter of an address, an entry of a connection string."""

_INSTEAD = "[removed]"
_SHORTEST = 8  # letters of a secret in the environment that is looked for elsewhere
_LONGEST = 500  # letters of a text
_MOST = 1000  # members of a container
_DEEPEST = 8  # containers within containers

_LEFT_OUT = object()


def header_of(trainer: Trainer, module: LightningModule, monitors: Mapping[str, Any]) -> dict[str, Any]:
    """What a record file should say of the run that it belongs to.

    Args:
        trainer: The Trainer.
        module: Its module.
        monitors: What the monitors say of themselves, by label.
    """
    header = {
        "time": round(time.time(), 3),
        "versions": {
            "lightning_dynamics": lightning_dynamics.__version__,
            "lightning": lightning.__version__,
            "torch": str(torch.__version__),
            "python": platform.python_version(),
        },
        "module": type(module).__name__,
        "hyperparameters": plain(module.hparams),
        "trainer": {
            "max_epochs": trainer.max_epochs,
            "max_steps": trainer.max_steps,
            "accumulate_grad_batches": trainer.accumulate_grad_batches,
            "gradient_clip_val": trainer.gradient_clip_val,
            "gradient_clip_algorithm": str(trainer.gradient_clip_algorithm) if trainer.gradient_clip_val else None,
            "precision": str(trainer.precision),
            "strategy": type(trainer.strategy).__name__,
            "world_size": trainer.world_size,
            "batches_per_epoch": trainer.num_training_batches if trainer.num_training_batches < 1e300 else None,
        },
        "monitors": monitors,
    }
    cleaned: dict[str, Any] = without_secrets(header)
    return cleaned


def facts(header: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """What a reader of the curves should know of this run first."""
    for label, monitor in header["monitors"].items():
        probe = monitor["probe"]
        share = "" if probe["fraction"] is None else f" of {probe['N']} ({100 * probe['fraction']:.3g} %)"
        yield f"{label}, data", f"{probe['kind']}" + (f", {probe['n']} samples{share}" if probe["n"] else "")
        if "threshold_rule" in monitor:
            yield f"{label}, threshold", monitor["threshold_rule"]
        yield f"{label}, cadence", monitor["cadence"]
    yield "versions", ", ".join(f"{name} {version}" for name, version in header["versions"].items())


def plain(hyperparameters: Any) -> dict[str, Any]:
    """Hyper-parameters that are numbers, texts or containers of them; the others, and secrets, are left out.

    A secret is what is called like one, what contains the value of an environment variable that is called like one, and
    what looks like an access token. Addresses lose user and password; long texts are cut, and what has very many
    members is left out.
    """
    found = _plain(hyperparameters, _environment(), 0)
    return found if isinstance(found, dict) else {}


def without_secrets(thing: Any) -> Any:
    """The same with secrets removed from all texts in it; of other objects nothing is known, and they stay."""
    secrets = _environment()

    def cleaned(each: Any) -> Any:
        if isinstance(each, str):
            for secret in secrets:
                each = each.replace(secret, _INSTEAD)
            return _TOKEN.sub(_INSTEAD, _without_credentials(each))
        if isinstance(each, Mapping):
            return {key: cleaned(value) for key, value in each.items()}
        if type(each) in (list, tuple):
            return type(each)(map(cleaned, each))
        return each

    return cleaned(thing)


def _environment() -> list[str]:
    """Secrets of the environment, the longest first."""
    found = {value.strip() for name, value in os.environ.items() if _SECRET.search(name)}
    return sorted((value for value in found if len(value) >= _SHORTEST), key=len, reverse=True)


def _plain(value: Any, secrets: Sequence[str], depth: int) -> Any:
    """A value that JSON knows, or :data:`_LEFT_OUT`."""
    try:
        return _converted(value, secrets, depth)
    except Exception:  # a configuration that cannot be resolved, an object that cannot be looked at
        return _LEFT_OUT


def _converted(value: Any, secrets: Sequence[str], depth: int) -> Any:
    if isinstance(value, Enum):
        value = value.value
    if isinstance(value, (np.generic, np.ndarray, torch.Tensor)):
        value = value.item() if value.ndim == 0 else _LEFT_OUT
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int):
        return int(value) if value.bit_length() <= 64 else _LEFT_OUT
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else _LEFT_OUT
    if isinstance(value, (str, PurePath)):
        return _text(str(value), secrets)
    if depth >= _DEEPEST or isinstance(value, (bytes, bytearray, memoryview, type)):
        return _LEFT_OUT
    if isinstance(value, (Namespace, SimpleNamespace)):
        value = vars(value)
    elif isinstance(value, tuple) and hasattr(value, "_asdict"):
        value = value._asdict()
    elif dataclasses.is_dataclass(value):
        value = {field.name: getattr(value, field.name, _LEFT_OUT) for field in dataclasses.fields(value)}
    if not isinstance(value, (Mapping, Sequence, Set)) or len(value) > _MOST:
        return _LEFT_OUT
    if isinstance(value, Mapping):
        return dict(_entries(value, secrets, depth))
    return list(_members(value, secrets, depth))


def _members(values: Iterable[Any], secrets: Sequence[str], depth: int) -> Iterator[Any]:
    is_secret = False
    for value in values:
        member = _LEFT_OUT if is_secret else _plain(value, secrets, depth + 1)
        # a command line: an option, and what is given to it
        is_option = isinstance(value, str) and value.startswith("-") and "=" not in value
        is_secret = is_option and bool(_SECRET.search(value))
        if member is not _LEFT_OUT:
            yield member


def _entries(values: Mapping[Any, Any], secrets: Sequence[str], depth: int) -> Iterator[tuple[str, Any]]:
    for key in values:
        name = _text(str(key), secrets)
        if name is _LEFT_OUT or _SECRET.search(str(key)):
            continue
        try:
            value = _plain(values[key], secrets, depth + 1)
        except Exception:  # a value that another one is missing for
            continue
        if value is not _LEFT_OUT:
            yield name, value


def _text(text: str, secrets: Sequence[str]) -> Any:
    if _TOKEN.search(text) or any(secret in text for secret in secrets):
        return _LEFT_OUT
    text = _without_credentials(text)
    return text if len(text) <= _LONGEST else text[: _LONGEST - 1] + "…"


def _without_credentials(text: str) -> str:
    return _GIVEN.sub(rf"\1{_INSTEAD}", _USER.sub(r"\1", text))
