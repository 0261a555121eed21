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


LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQR"
HEX = "89abcdef0123456789abcdef0123456789abcdef"

SECRET_NAMES = (
    "password passwd passphrase pass db_pass PGPASSWORD PassWord pwd PWD pw db-pw pin login secret client_secret "
    "secrets credential awsCredentials auth basic.auth oauth2 authorization Proxy-Authorization apikey api_key "
    "x-api-key API_KEY_2 access_key AWS_ACCESS_KEY_ID private_key secretKey ssh_key sshkey encryption-key LICENSE_KEY "
    "apiKeys APIKey key token Token api_token apitoken hf_token access_token refreshToken session_token"
)


@pytest.mark.parametrize("name", [*SECRET_NAMES.split(), "api key", "license key"])
def test_what_is_called_like_a_secret_is_left_out(name):
    assert plain({name: "word", "kept": 1}) == {"kept": 1}
    assert plain({name: ["word"], "kept": 1}) == {"kept": 1}
    assert plain({name: {"of": "word"}, "kept": 1}) == {"kept": 1}
    assert plain({"argv": [f"--{name.replace(' ', '-')}", "word", "--lr", "3"]})["argv"][1:] == ["--lr", "3"]
    assert without_secrets({name: "word", "kept": "word"}) == {name: "[removed]", "kept": "word"}
    assert without_secrets({name: ["word", 3]}) == {name: ["[removed]", 3]}


@pytest.mark.parametrize("name", ["password", "db_pass", "pwd", "pw", "pin", "secret", "credentials", "login", "auth"])
def test_numbers_can_be_secrets_but_switches_cannot(name):
    assert plain({name: 1234}) == plain({name: [1.5]}) == {}
    assert plain({name: True}) == {name: True}
    assert plain({name: None}) == {name: None}


HARMLESS = {
    "num_tokens": 512,
    "max_tokens": 10**9,
    "tokens": 3,
    "tokens_per_batch": "auto",
    "tokenizer": "bert-base-uncased-2019-whole-word-masking",
    "tokenizer_name": "WordPiece",
    "token_dropout": 0.1,
    "use_cls_token": True,
    "padding_token_id": 0,
    "pad_token": "[PAD]",
    "eos_token": "</s>",
    "mask_token": "MASK",
    "bos_token": "<|endoftext|>",
    "special_tokens": ["[CLS]", "<extra_id_0>", {"unk": "<unk>"}],
    "token": 3,
    "api_key": None,
    "key": 7,
    "keys": ["image", "label"],
    "key_dim": 64,
    "num_key_value_heads": 8,
    "keypoints": "coco",
    "label_key": "labels",
    "monitor_key": "val/loss_of_the_second_head_10",
    "monkey": "capuchin",
    "author": "Johannes",
    "authors": ["A. Author"],
    "pin_memory": True,
    "pin_memory_device": "cuda",
    "bypass": "last",
    "compass": 4,
    "secretary": "problem",
    "keyboard-layout": "standard",
    "commit": HEX,
    "model_revision": HEX,
    "git": {"sha1": [HEX]},
    "checkpoint": f"hub/snapshots/{HEX}/model.ckpt",
    "source": f"git+https://example.org/a@{HEX}",
    "note": f"commit {HEX}",
    "argv": ["--revision", HEX, "--max-tokens", "4096", "--use-auth", "--lr", "3"],
    "command": "train.py --max-tokens 512 --use-auth --pad-token [PAD] --label-key y GPT(num_tokens=64)",
    "text": "Basic training, bearer of news; a key value store: 3, time: 10:30",
    "json": '{"max_tokens": 5, "tokenizer": "x", "author": ["y"]}',
    "long_word": "eyJ-and-some-more",
    "hub": "hf_internal_testing_tiny_random_bert",
    "module": "sk-learn",
}


@pytest.mark.parametrize("name", HARMLESS)
def test_what_only_sounds_like_a_secret_is_kept(name):
    entry = {name: HARMLESS[name]}
    assert plain(entry) == entry
    assert without_secrets(entry) == entry


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("pad_token", "abcdefghijklm"),  # thirteen letters
        ("some_token", "ab-12"),
        ("stripe_key", "0123456789abcdef"),
        ("token_source", "a0123456789abcdefg"),
        ("tokens", {"hf": "word"}),
        ("anything", HEX),
        ("anything", [f"login {HEX}"]),
        ("key_of_run", HEX),
    ],
)
def test_keys_and_tokens_of_other_names_must_look_harmless(name, value):
    assert plain({name: value}) in ({}, {name: []})


@pytest.mark.parametrize(
    "token",
    [
        *(prefix + LETTERS for prefix in ["wandb_v1_", "AIza", "ya29.", "sk_live_", "npm_", "pypi-", "nvapi-", "r8_"]),
        *(prefix + LETTERS for prefix in ["hf_", "sk-", "glpat-", "xoxb-", "ghp_", "github_pat_"]),
        *(f"ASIA{4 * 'ABC7'}", f"AKIA{4 * 'ABC7'}", f"eyJ{LETTERS[:40]}", 2 * f"eyJ{LETTERS[:10]}." + "abc", HEX),
        *("hooks.slack.com/services/T0/B0/abc", "discord.com/api/webhooks/1/abc"),
        "-----BEGIN RSA PRIVATE KEY-----\nabc\n-----END RSA PRIVATE KEY-----",
    ],
)
def test_tokens_are_known_by_their_looks(token):
    assert plain({"a": token, "b": f"see ({token}) there", "c": 1}) == {"c": 1}
    assert without_secrets(f'see "{token}" there') == 'see "[removed]" there'


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("train.py --api-key hunter2secret --lr 3", "train.py --api-key [removed] --lr 3"),
        ("train.py --verbose --token 'a b' -pw x", "train.py --verbose --token '[removed]' -pw [removed]"),
        ("--hf_token=x --seed=3", "--hf_token=[removed] --seed=3"),
        ("password: x", "password: [removed]"),
        ("note: password: x", "note: password: [removed]"),
        ("the API key: x", "the API key: [removed]"),
        ('{"password": "x"}', '{"password": "[removed]"}'),
        ('{"lr": 3, "pin": 1234}', '{"lr": 3, "pin": [removed]}'),
        (r'{"a": "{\"password\": \"x\"}"}', r'{"a": "{\"password\": \"[removed]\"}"}'),
        (r'{"password": "x\"y", "lr": 3}', r'{"password": "[removed]", "lr": 3}'),
        ('{"auth": {"user": "x"}, "lr": 3}', '{"auth": [removed], "lr": 3}'),
        ("{'api_keys': ['x', 'y'], 'lr': 3}", "{'api_keys': [removed], 'lr': 3}"),
        ("Server=db;Pwd=x;Timeout=3", "Server=db;Pwd=[removed];Timeout=3"),
        ("Model(secret='x, y', width=3)", "Model(secret='[removed]', width=3)"),
        ("Authorization: Basic dXNlcjpwYXNz", "Authorization: Basic [removed]"),
        ("curl -H 'Basic dXNlcjpwYXNzd29yZA=='", "curl -H 'Basic [removed]'"),
        ("bearer abcdefghijklmnop", "bearer [removed]"),
        ("https://h/a?sig=x&part=1", "https://h/a?sig=[removed]&part=1"),
    ],
)
def test_texts_lose_what_they_call_like_a_secret(text, left):
    assert plain({"text": text}) == {"text": left}
    assert without_secrets([text]) == [left]
    assert without_secrets(left) == left


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("AUTH_MODE", "disabled"),
        ("GIT_AUTHOR_NAME", "Johannes"),
        ("KEYBOARD_LAYOUT", "standard"),
        ("PWD", "/home/someone/work-1"),
        ("SSH_AUTH_SOCK", "/tmp/ssh-XX/agent.1"),
        ("CREDENTIALS", r"C:\Users\a.json"),
        ("AUTH_URL", "https://example.org/login"),
        ("TOKENIZERS_PARALLELISM", "Disabled"),
        ("PAD_TOKEN", "Separator"),
        ("API_KEY", "Short12"),
    ],
)
def test_of_the_environment_only_secrets_are_looked_for(monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    text = f"with {value} of it"
    assert plain({"text": text}) == {"text": text}
    assert without_secrets(text) == text


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("DB_PASS", "Swordfish"),
        ("MYSQL_PWD", "swordfish-1"),
        ("SERVICE_KEY", "swordfish1"),
        ("SOME_TOKEN", "Sword fish 0123456789abcdef"),
        ("AUTH", "https://u:p@example.org"),
        ("AUTH", "dXNlcjpwYXNz/+=="),
        ("LOGIN_TOKEN", "https://hooks.slack.com/services/T0/B0/abc"),
    ],
)
def test_secrets_of_the_environment_are_found_in_texts(monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    assert plain({"text": f"with {value} of it"}) == {}
    assert without_secrets(f"with {value} of it") == "with [removed] of it"


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
