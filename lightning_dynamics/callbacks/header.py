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

_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")
"""A word of a name: "db_apiKeys" is compared as "db api keys"."""

_SECRET = re.compile(
    r"\b(?:auth|oauth|authorization|authentication|jwt|pwd)s?\b"
    r"|(?:pass ?word|passwd|pass ?phrase|pass ?code|secret|credential)s?\b"
    r"|\b(?:pass|pw|pin|login)$"  # not `pin_memory_device`
)
"""How things are called whose values are nobody's business."""

_OPENS = re.compile(
    r"^(?:key|token)$"
    r"|\b(?:access|account|api|auth|bearer|bot|deploy|encryption|github|gitlab|hf|huggingface|licen[cs]e|login|openai"
    r"|personal|private|refresh|service|session|signing|ssh|storage|subscription|wandb) ?(?:key|token)s?\b"
)
"""Names of keys and tokens that open something; those of others are hyper-parameters: `label_key`, `pad_token`."""

_SPECIAL = re.compile(r"[A-Za-z]{0,12}|</?\|?\w{1,20}\|?>|\[\w{1,20}\]|[-+]?\d+(?:[._]\d+)*(?:e[-+]?\d+)?")
"""Values of other tokens: they belong to a vocabulary, or say how many."""

_OPAQUE = re.compile(r"(?<![A-Za-z\d])(?=[A-Za-z]*\d)[A-Za-z\d]{16,}")
"""What is no name of anything."""

_TOKEN = re.compile(
    r"(?<![A-Za-z\d])(?:gh[opsur]_\w{20,}|github_pat_\w{20,}|glpat-[\w-]{16,}|(?:hf|r8)_[A-Za-z\d]{20,}"
    r"|npm_[A-Za-z\d]{16,}|pypi-\w{16,}|sk-[\w-]{20,}|[prs]k_(?:live|test)_\w{10,}|nvapi-[\w-]{16,}|wandb_v1_\w{10,}"
    r"|local-[\da-f]{40}|A[KS]IA[\dA-Z]{16}|AIza[\w-]{20,}|ya29\.[\w-]{16,}|xox[abeoprs]-[\w-]{10,}"
    r"|eyJ[\w-]{10,}\.[\w-]{10,}\.[\w-]*|eyJ[\w-]{30,})"
    r"|hooks\.slack\.com/[^\s\"']+|discord(?:app)?\.com/api/webhooks/[^\s\"']+"
    r"|-----BEGIN [A-Z ]*PRIVATE KEY(?s:.*?)(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)"
)
"""What access tokens, private keys and the addresses of webhooks look like, whatever they are called."""

_HASH = re.compile(r"(?:(?<![\w.-])([\w.-]+)[\"']?[\s=:]+[\"']?)?(?<![\w/@.-])[\da-f]{40}(?![\w/-])")
"""A key of W&B or the hash of a commit: what stands before it decides."""

_HASHED = re.compile(r"\b(?:checksum|commit|digest|git|hash|ref|rev|revision|sha|version)(?:s|es)?\b")

_USER = re.compile(r"([a-z][a-z0-9+.-]{0,30}://)(?:[^/?#\s]*@|[^/?#\s:]*:(?!\d+(?:[/?#\s]|$))\S*@)", re.IGNORECASE)
"""User and password in an address, also where the password is not encoded."""

_UNNAMED = re.compile(
    r"([?&][\w-]*(?i:sig)[\w-]*=|\b(?i:bearer)\s+(?=\S{16})|\b(?i:basic)\s+(?=\S{12})(?=\S+[A-Z\d=]))[^\s&;,#\"']+"
)
"""The signature of an address, and the credentials of a request."""

_GIVEN = re.compile(r"(?<![\w.-])(?:([\w.-]+)(?:\\*[\"'])?[ \t]*[=:][ \t]*|(--?[A-Za-z][\w.-]*)[ \t]+(?!--))")
"""A name that a value follows in a text: `name=`, `"name": ` or `--name `."""

_VALUE = re.compile(
    r"""(?P<quote>\\*["'])?(?:(?:basic|bearer|digest|negotiate|token)[ \t]+)?"""
    r"""(?P<value>(?(quote)(?:(?!(?P=quote))(?:\\.|.))*"""
    r"""|(?:\{[^{}]*\}|\[[^\[\]]*\]|[^\s&;,#]*[^\s&;,#)\]}]|[^\s&;,#]+)))""",
    re.IGNORECASE | re.DOTALL,
)
"""This value: what is in quotes or brackets, or a word."""

_OPTION = re.compile(r"--?[A-Za-z][\w.-]*")

_NO_SECRET = re.compile(r"[a-z]+|(?:~|\.{1,2}|[A-Za-z]:)?(?:[/\\][\w.,:@ -]*)+")
"""Values of the environment that are no secrets, whatever they are called: words and paths."""

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
    return {**without_secrets(header), "hyperparameters": header["hyperparameters"]}


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
    what looks like an access token. Texts lose what they call like a secret, addresses user and password; long texts
    are cut, and what has very many members is left out.
    """
    found = _plain(hyperparameters, _environment(), 0, "")
    return found if isinstance(found, dict) else {}


def without_secrets(thing: Any) -> Any:
    """The same with secrets removed from all texts in it; of other objects nothing is known, and they stay."""
    secrets = _environment()

    def cleaned(each: Any, name: str) -> Any:
        if isinstance(each, str):
            return _INSTEAD if _hides(name, each) else _without_named(_without_known(each, name, secrets))
        if isinstance(each, Mapping):
            return {key: cleaned(value, str(key)) for key, value in each.items()}
        if type(each) in (list, tuple):
            return type(each)(cleaned(member, option or name) for option, member in _with_options(each))
        return each

    return cleaned(thing, "")


def _hides(name: str, value: Any) -> bool:
    """Whether a value, made of what JSON knows, is secret for the name that it has."""
    words = _words(name)
    if value is None or isinstance(value, bool):
        return False
    if _SECRET.search(words):
        return True
    if not re.search(r"(?:key|token)s?\b", words):
        return False
    if isinstance(value, dict):
        return any(_hides(name, each) or _hides(f"{key} {name}", each) for key, each in value.items())
    if isinstance(value, list):
        return any(_hides(name, each) for each in value)
    if not isinstance(value, str):
        return False  # a size
    if _OPENS.search(words):
        return True
    if re.search(r"\btokens?$", words) and " " not in value:
        return not _SPECIAL.fullmatch(value)
    return bool(_OPAQUE.search(value))


def _words(name: str) -> str:
    return " ".join(_WORD.findall(name)).lower()


def _environment() -> list[str]:
    """Secrets of the environment, the longest first."""
    found = {value.strip() for name, value in os.environ.items() if _hides(name, value.strip())}
    return sorted((value for value in found if len(value) >= _SHORTEST and not _is_known(value)), key=len, reverse=True)


def _is_known(value: str) -> bool:
    if re.fullmatch(r"[a-z][a-z\d+.-]*://\S+", value):
        return _without_named(_without_known(value, "", ())) == value
    return bool(_NO_SECRET.fullmatch(value))


def _without_known(text: str, name: str, secrets: Sequence[str]) -> str:
    """A text of this name without secrets of the environment, and without what looks like a token."""
    for secret in secrets:
        text = text.replace(secret, _INSTEAD)

    def judged(found: re.Match[str]) -> str:
        return found[0] if _HASHED.search(_words(found[1] or name)) else found[0][:-40] + _INSTEAD

    return _HASH.sub(judged, _TOKEN.sub(_INSTEAD, text))


def _without_named(text: str) -> str:
    """A text without credentials in addresses, and without values that it gives secret names to."""
    text = _UNNAMED.sub(rf"\1{_INSTEAD}", _USER.sub(r"\1", text))
    parts, end = [], 0
    for given in _GIVEN.finditer(text):
        found = _VALUE.match(text, given.end()) if given.end() >= end else None
        if found and found["value"] and _hides(given[1] or given[2], found["value"]):
            parts += [text[end : found.start("value")], _INSTEAD]
            end = found.end("value")
    return "".join([*parts, text[end:]])


def _plain(value: Any, secrets: Sequence[str], depth: int, name: str) -> Any:
    """A value that JSON knows, or :data:`_LEFT_OUT`."""
    try:
        return _converted(value, secrets, depth, name)
    except Exception:  # a configuration that cannot be resolved, an object that cannot be looked at
        return _LEFT_OUT


def _converted(value: Any, secrets: Sequence[str], depth: int, name: str) -> Any:
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
        return _text(str(value), secrets, name)
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
    return list(_members(value, secrets, depth, name))


def _members(values: Iterable[Any], secrets: Sequence[str], depth: int, name: str) -> Iterator[Any]:
    for option, value in _with_options(values):
        member = _plain(value, secrets, depth + 1, option or name)
        if member is not _LEFT_OUT and not _hides(option, member):
            yield member


def _with_options(values: Iterable[Any]) -> Iterator[tuple[str, Any]]:
    """Members, and what a command line calls them: the option before."""
    option = ""
    for value in values:
        found = _OPTION.match(value) if isinstance(value, str) else None
        yield "" if found and value.startswith("--") else option, value
        option = value if found and found[0] == value else ""


def _entries(values: Mapping[Any, Any], secrets: Sequence[str], depth: int) -> Iterator[tuple[str, Any]]:
    for key in values:
        name = _text(str(key), secrets, "")
        try:
            value = _plain(values[key], secrets, depth + 1, str(key))
        except Exception:  # a value that another one is missing for
            continue
        if name is not _LEFT_OUT and value is not _LEFT_OUT and not _hides(str(key), value):
            yield name, value


def _text(text: str, secrets: Sequence[str], name: str) -> Any:
    text = text[: 8 * _LONGEST]  # what comes later cannot be in what is kept
    if _without_known(text, name, secrets) != text:
        return _LEFT_OUT
    text = _without_named(text)
    return text if len(text) <= _LONGEST else text[: _LONGEST - 1] + "…"
