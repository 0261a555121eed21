"""Which part may import which: arrows point one way."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

import lightning_dynamics

ROOT = Path(lightning_dynamics.__file__).parent
STANDARD = sys.stdlib_module_names
OURS = "lightning_dynamics."

ALLOWED = {
    "linalg": {"torch"},
    "objective": {"torch", "numpy", "linalg"},
    "metrics": {"torch", "torchmetrics", "linalg"},
    "recording": {"torch", "matplotlib", "pandas", "plotly", "tensorboard", "wandb", "wandb_workspaces"},
    "strategies": {"torch", "lightning", "objective", "_compat"},
    "callbacks": {
        "torch",
        "numpy",
        "lightning",
        "linalg",
        "objective",
        "metrics",
        "strategies",
        "recording",
        "_compat",
        "",
    },
    "experiments": {
        "torch",
        "lightning",
        "matplotlib",
        "linalg",
        "objective",
        "metrics",
        "callbacks",
        "recording",
        "_compat",
    },
    "cli": {"callbacks", "recording", ""},
    "_compat": {"torch", "lightning"},
    "__main__": {"cli"},
    "_names": set(),
    "__init__": {"callbacks", "experiments", "recording", "strategies", "_names"},
}
"""What each part may import besides the standard library and itself; our own parts by their bare names."""


def imports(path):
    """Modules that a file imports, our own without the package's name."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = [node.module]
            if node.module == "lightning_dynamics":
                names = [OURS + alias.name for alias in node.names]
        for name in names:
            yield "" if name == "lightning_dynamics" else name.removeprefix(OURS)


def run(code):
    """Run in a fresh interpreter."""
    path = os.pathsep.join([str(ROOT.parent), os.environ.get("PYTHONPATH", "")])
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120, env={**os.environ, "PYTHONPATH": path})


FILES = sorted(path for path in ROOT.rglob("*.py") if "__pycache__" not in path.parts)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_arrows_point_one_way(path):
    part = path.relative_to(ROOT).parts[0].removesuffix(".py")
    for name in imports(path):
        top = name.partition(".")[0]
        assert top in STANDARD or top == part or top in ALLOWED[part], f"{part} imports {name or 'the package'}"


def test_private_names_of_lightning_stand_in_one_file():
    """Attributes of the Trainer and its parts that begin with an underscore."""
    owners = {"trainer", "fit_loop", "epoch_loop", "strategy", "precision_plugin"}
    for path in FILES:
        if path.name == "_compat.py":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__"):
                value = node.value
                owner = value.attr if isinstance(value, ast.Attribute) else getattr(value, "id", None)
                assert owner not in owners, f"{path.name}:{node.lineno} uses {owner}.{node.attr}"


def test_nothing_is_ever_unpickled():
    """Whatever reads what a run left: records, event files."""
    for path in (path for path in FILES if path.relative_to(ROOT).parts[0] in ("recording", "cli")):
        assert not {"pickle", "marshal", "shelve", "dill"} & set(imports(path)), path
        text = path.read_text(encoding="utf-8")
        assert not any(call in text for call in ("torch.load", "allow_pickle", "eval(", "exec(")), path


def test_the_mathematics_works_without_lightning():
    """In a notebook on a plain module with a closure."""
    code = """
import sys
for name in ("lightning", "pytorch_lightning", "wandb", "tensorboard"):
    sys.modules[name] = None
import torch
import lightning_dynamics
from lightning_dynamics import linalg, metrics, objective

net = torch.nn.Linear(3, 1, bias=False)
x, y = torch.randn(8, 3), torch.randn(8, 1)
loss = objective.Objective(net, lambda net, batch: (net(batch[0]) - batch[1]).square().mean() / 2, [(x, y)])
with objective.hessian(loss) as h:
    pairs = linalg.eigenpairs(h, 1, 1)
expected = torch.linalg.eigvalsh(x.T @ x / 8)
assert torch.allclose(pairs.top.values[0].float(), expected[-1], rtol=1e-3), (pairs, expected)
rule = metrics.stability_rule([torch.optim.SGD(net.parameters(), 0.1)], dict(net.named_parameters()))
assert rule.threshold == 20
"""
    run(code)


def test_records_are_read_where_nothing_is_drawn():
    run(
        "import sys; sys.modules.update(dict.fromkeys(['lightning', 'matplotlib', 'wandb'])); "
        "from lightning_dynamics import recording, read_records"
    )


def test_importing_the_package_is_light():
    code = "import sys, lightning_dynamics; assert not {'torch', 'lightning'} & set(sys.modules), 'heavy'"
    run(code)


def test_the_door_shows_the_public_names():
    for name in lightning_dynamics.__all__:
        assert getattr(lightning_dynamics, name).__doc__, name
    assert set(lightning_dynamics.__all__) <= set(dir(lightning_dynamics))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = lightning_dynamics.nothing
