"""What enters the header of a record file, and what never enters a record: secrets."""

from __future__ import annotations

import argparse
import collections
import dataclasses
import enum
import json
import types
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.fit import fit
from helpers.modules import Regression

from lightning_dynamics import HessianMonitor, Probe
from lightning_dynamics.callbacks.header import plain, without_secrets

ENVIRONMENT = {
    "MY_SERVICE_TOKEN": "corridor-of-secrets",
    "DB_PASSWORD": "hunter2-hunter2",
    "WANDB_API_KEY": "0123456789abcdef0123456789abcdef01234567",
    "AUTH": "short",
    "WORKERS": "not-secret-at-all",
}


@pytest.fixture(autouse=True)
def _environment(monkeypatch):
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)


class Lazy(Mapping):
    """A configuration with an entry that cannot be resolved."""

    def __init__(self, **entries):
        self.entries = entries

    def __getitem__(self, name):
        if name == "missing":
            raise KeyError("interpolation of a key that is not there")
        return self.entries[name]

    def __iter__(self):
        return iter([*self.entries, "missing"])

    def __len__(self):
        return len(self.entries) + 1


@dataclasses.dataclass
class Optimization:
    lr: float = 0.5
    secret: str = "dataclass-secret"
    inner: dict = dataclasses.field(default_factory=lambda: {"momentum": 0.9, "password": "inner-password"})


Service = collections.namedtuple("Service", ["region", "api_token"])


class Colour(enum.Enum):
    RED = "red"


class Unseen:
    def __repr__(self):
        return "repr-of-an-object"


SECRETS = {
    "api_key": "named-secret-1",
    "auth": {"user": "named-secret-2"},
    "run": "started with corridor-of-secrets",
    "same": ENVIRONMENT["DB_PASSWORD"],
    "nested": [{"wandb": {"entity": "us", "Token": "named-secret-3"}}, ["deep", ENVIRONMENT["WANDB_API_KEY"]]],
    "store": "postgres://someone:url-secret-1@db.example.org:5432/runs?sslmode=on",
    "odd_store": "mysql://someone:url/secret@2@db.example.org/runs",
    "remote": "https://url-secret-3@git.example.org/x.git",
    "signed": "https://files.example.org/set.zip?X-Amz-Signature=url-secret-4&part=1",
    "dsn": "host=db.example.org;Password=url-secret-5;user=someone",
    "argv": ["--lr", "0.1", "--api-key", "named-secret-4", "--token=named-secret-5", "--seed", "3"],
    "optimization": Optimization(),
    "namespace": argparse.Namespace(width=7, my_secret="named-secret-6"),
    "simple": types.SimpleNamespace(depth=2, credentials="named-secret-7"),
    "service": Service("north", "named-secret-8"),
    "lazy": Lazy(kept=1, auth_token="named-secret-9"),
    "hub": "hf_" + "abcdefghijklmnopqrstuvwxyz",
    "pem": "-----BEGIN RSA PRIVATE KEY-----\nnamed-secret-10",
    "binary": b"bytes-secret",
    "object": Unseen(),
    "values": {ENVIRONMENT["DB_PASSWORD"]: 1},
    "long": "x" * 490 + "corridor-of-secrets",
    "headers": "Authorization: Bearer abcdefghijklmnop-named-secret-11",
}


class Hostile(Regression):
    def __init__(self, **options):
        super().__init__(lr=1e-3)
        self.save_hyperparameters()


def recorded(folder, **options):
    monitor = HessianMonitor(2, 1, every_n_train_steps=2, probe=Probe(whole=True), spectrum=False)
    fit(monitor, Hostile(**options), max_epochs=2, default_root_dir=folder)
    return monitor.record_path


def test_no_secret_is_anywhere_in_the_bytes_of_a_record(tmp_path):
    file = recorded(tmp_path, **SECRETS)
    content = file.read_bytes()
    words = [
        "named-secret",
        "dataclass-secret",
        "inner-password",
        "url-secret",
        "url/secret",
        "secret@2",
        "bytes-secret",
    ]
    words += ["bytes-secret", "hf_abc", "PRIVATE KEY", "repr-of-an-object"]
    words += [ENVIRONMENT[name] for name in ("MY_SERVICE_TOKEN", "DB_PASSWORD", "WANDB_API_KEY")]
    for word in words:
        assert word.encode() not in content, word
    found = json.loads(content.splitlines()[0])["hyperparameters"]
    assert found == {
        "nested": [{"wandb": {"entity": "us"}}, ["deep"]],
        "store": "postgres://db.example.org:5432/runs?sslmode=on",
        "odd_store": "mysql://db.example.org/runs",
        "remote": "https://git.example.org/x.git",
        "signed": "https://files.example.org/set.zip?X-Amz-Signature=[removed]&part=1",
        "dsn": "host=db.example.org;Password=[removed];user=someone",
        "argv": ["--lr", "0.1", "--api-key", "--token=[removed]", "--seed", "3"],
        "optimization": {"lr": 0.5, "inner": {"momentum": 0.9}},
        "namespace": {"width": 7},
        "simple": {"depth": 2},
        "service": {"region": "north"},
        "lazy": {"kept": 1},
        "values": {},
        "headers": "Authorization: Bearer [removed]",
    }


def test_what_is_plain_is_kept(tmp_path):
    options = {
        "lr": 0.1,
        "width": 3,
        "on": True,
        "nothing": None,
        "name": "net",
        "workers": "not-secret-at-all",
        "brief": "short",  # too short to be told from any other word
        "data": Path("some") / "where",
        "betas": (0.9, 0.999),
        "blocks": [{"depth": 2, "sizes": [3, (4, 5)]}],
        "set": {4},
        "numpy": [np.float32(0.5), np.int64(3), np.bool_(True), np.array(2.0), np.str_("text")],
        "torch": [torch.tensor(1.5), torch.tensor(3), torch.tensor(False)],
        "colour": Colour.RED,
        "address": "https://example.org:8080/@scope/part?page=2#top",
        "port": "tcp://host:8080",
    }
    found = json.loads(recorded(tmp_path, **options).read_text().splitlines()[0])["hyperparameters"]
    expected = {
        **options,
        "data": str(options["data"]),
        "betas": [0.9, 0.999],
        "blocks": [{"depth": 2, "sizes": [3, [4, 5]]}],
        "set": [4],
        "numpy": [0.5, 3, True, 2.0, "text"],
        "torch": [1.5, 3, False],
        "colour": "red",
    }
    assert found == expected


def test_what_json_has_no_place_for_is_left_out():
    loop = {}
    loop["again"] = loop
    left_out = {
        "inf": float("inf"),
        "nan": np.float64("nan"),
        "array": np.zeros(3),
        "tensor": torch.zeros(2),
        "huge": 10**5000,
        "function": test_what_is_plain_is_kept,
        "module": torch.nn.Linear(1, 1),
        "class": Optimization,
        "range": range(10**9),
    }
    assert plain({**left_out, "kept": 1}) == {"kept": 1}
    assert json.dumps(plain(loop)).count("again") <= 10
    assert plain(None) == plain(3) == {}


def test_long_texts_are_cut():
    found = plain({"text": "a" * 2000, "fits": "b" * 500, 3: {"n" * 2000: 1}})
    assert found["text"] == "a" * 499 + "…"
    assert found["fits"] == "b" * 500
    (name,) = found["3"]
    assert len(name) == 500


@pytest.mark.parametrize(
    ("address", "left"),
    [
        ("s3://key:word@bucket/x", "s3://bucket/x"),
        ("redis://:word@host:6379/0", "redis://host:6379/0"),
        ("see ftp://u:p@h/a and http://v:q@i/b", "see ftp://h/a and http://i/b"),
        ("http://u:p@ss@h/a", "http://h/a"),
        ("postgresql+asyncpg://u:p@[::1]:5432/a", "postgresql+asyncpg://[::1]:5432/a"),
        ("http://h:80/a@b", "http://h:80/a@b"),
        ("git@example.org:a/b", "git@example.org:a/b"),
        ("no address: a@b", "no address: a@b"),
    ],
)
def test_addresses_lose_their_credentials(address, left):
    assert plain({"address": address}) == {"address": left}


def test_notes_of_records_carry_no_secrets_either(tmp_path):
    class Talkative(HessianMonitor):
        def measure(self, point):
            measured = super().measure(point)
            measured.notes["no_luck"] = [f"cannot reach ftp://u:note-secret@h with {ENVIRONMENT['DB_PASSWORD']}", 3]
            return measured

    monitor = Talkative(2, 1, every_n_train_steps=2, probe=Probe(whole=True), spectrum=False)
    fit(monitor, Regression(), max_epochs=2, default_root_dir=tmp_path)
    content = monitor.record_path.read_text()
    assert "note-secret" not in content
    assert ENVIRONMENT["DB_PASSWORD"] not in content
    assert monitor.history[0].notes["no_luck"] == ["cannot reach ftp://h with [removed]", 3]


def test_only_texts_are_looked_through():
    thing = {"a": (1, None, "plain", [2.5, torch.float32]), "corridor-of-secrets": {"b": True}}
    assert without_secrets(thing) == thing


def test_an_environment_without_secrets_removes_nothing(monkeypatch):
    for name in ENVIRONMENT:
        monkeypatch.delenv(name)
    text = "started with corridor-of-secrets"
    assert plain({"run": text}) == {"run": text}
    assert without_secrets(text) == text
