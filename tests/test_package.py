"""What is shipped: a wheel and an sdist that build, install and bring their type marker."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import lightning_dynamics

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The sdist, and the wheel that is built from it."""
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    return folder


def test_the_wheel_holds_the_package_its_types_and_nothing_else(built):
    (wheel,) = built.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert "lightning_dynamics/py.typed" in names
    files = (path for kind in ("py", "css", "js") for path in (ROOT / "lightning_dynamics").rglob(f"*.{kind}"))
    own = {path.relative_to(ROOT).as_posix() for path in files}
    assert own <= set(names)
    assert all(re.match(r"lightning_dynamics[/-]", name) for name in names)
    metadata = zipfile.ZipFile(wheel).read(next(n for n in names if n.endswith("/METADATA"))).decode()
    assert f"Version: {lightning_dynamics.__version__}" in metadata
    assert "License-Expression: Apache-2.0" in metadata
    assert "Requires-Dist: lightning!=2.6.2,!=2.6.3,<3,>=2.4" in metadata


def test_the_sdist_holds_what_is_needed_to_test_it(built):
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"README.md", "CHANGELOG.md", "LICENSE", "pyproject.toml", "examples/quickstart.py"} <= names
    assert {"docs/conf.py", "tests/conftest.py", ".ci/constraints.txt"} <= names


def test_the_installed_wheel_works(built, tmp_path):
    (wheel,) = built.glob("*.whl")
    place = tmp_path / "site"
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", place, wheel]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    code = """
import lightning_dynamics, pathlib
assert pathlib.Path(lightning_dynamics.__file__).is_relative_to(pathlib.Path.cwd() / "site")
print(lightning_dynamics.HessianMonitor(every_n_train_steps=5).label)
"""
    env = {**os.environ, "PYTHONPATH": str(place)}
    done = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=tmp_path, env=env, timeout=120
    )
    assert done.stdout.strip() == "HessianMonitor"


def test_the_changelog_knows_the_version():
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    version = lightning_dynamics.__version__
    assert "## Unreleased" in text if "dev" in version else f"## {version}" in text
