"""Record files of runs that never were, with everything that a report can draw."""

from __future__ import annotations

import math
import random

from lightning_dynamics.callbacks.collapse_table import collapse_table
from lightning_dynamics.callbacks.displacement_table import displacement_table
from lightning_dynamics.callbacks.hessian_table import hessian_table
from lightning_dynamics.callbacks.ledger import COST
from lightning_dynamics.callbacks.noise_table import noise_table
from lightning_dynamics.callbacks.sam_table import sam_table
from lightning_dynamics.callbacks.sharpness_table import sharpness_table
from lightning_dynamics.recording.record import Cost, Record, RecordFile

TABLES = (
    hessian_table(3, 1),
    collapse_table(None, False),
    displacement_table(None, True, True, ["top_1"]),
    sharpness_table(),
    noise_table(1),
    sam_table(),
)
MONITORS = {
    "HessianMonitor": "hessian",
    "NeuralCollapseMonitor": "collapse",
    "DisplacementMonitor": "displacement",
    "StochasticSharpnessMonitor": "sharpness",
    "GradientNoiseMonitor": "noise",
    "SAMMonitor": "sam",
}
PROBE = {"kind": "a random subset of the training set", "n": 512, "N": 1000, "fraction": 0.512}


def header(tables=TABLES, **more):
    quantities = {}
    for table in (*tables, COST):
        quantities.update(table.describe())
    families = {table.family: table.title for table in (*tables, COST)}
    monitors = {
        name: {"family": family, "cadence": "every 10 steps", "pair": False, "in_detail": "never", "probe": PROBE}
        for name, family in MONITORS.items()
        if family in families
    }
    if "HessianMonitor" in monitors:
        monitors["HessianMonitor"]["threshold_rule"] = "SGD(lr=0.2)"
    return {
        "time": 1_700_000_000.0,
        "versions": {"lightning_dynamics": "0.1", "lightning": "2.6.6", "torch": "2.13.0", "python": "3.11.7"},
        "module": "Net",
        "hyperparameters": {"lr": 0.2, "width": 32},
        "trainer": {"max_steps": 1000, "precision": "32-true", "strategy": "SingleDeviceStrategy", "world_size": 1},
        "monitors": monitors,
        "families": families,
        "quantities": quantities,
        **more,
    }


def write_run(directory, *, run="run", steps=range(0, 200, 10), tables=TABLES, layers=("net_0", "last"), **more):
    """A whole run; what ``more`` says stands in its header."""
    file = RecordFile(directory)
    said = header(tables, **more)
    file.begin(run, f"segment of {run}", None, said)
    draw = random.Random(run)
    families = {table.family for table in tables}
    for i, step in enumerate(steps):
        for name, family in MONITORS.items():
            if family in families:
                file.append(_record(name, family, step, i, draw, layers, is_last=step == steps[-1]))
        seconds = {name: 0.01 * i for name, family in MONITORS.items() if family in families}
        file.append_cost(Cost(step, said["time"] + step, 0.05, i // 10, seconds))
    return file.path


def _record(name, family, step, i, draw, layers, is_last):
    noise = 1 + 0.01 * draw.gauss(0, 1)
    scalars, errors, arrays, notes = {}, {}, {}, {"probe": PROBE}
    if family == "hessian":
        top = 10 * (1 - math.exp(-step / 60)) * noise + 0.5
        scalars = {"top_1": top, "top_2": top / 2, "top_3": top / 4, "bottom_1": -0.3, "stability_threshold": 10.0}
        scalars.update(edge_ratio=top / 10, probe_loss=math.exp(-step / 50), gradient_norm=0.2, top_1_swing=0.1)
        errors = {"top_1": 0.01, "edge_ratio": 0.001}
        if i % 5 == 0:
            scalars.update(trace=30.0, overlap_previous=0.9, overlap_first=0.3)
            arrays["density_nodes"] = [-0.3, -0.01, 0.0, 0.02, 0.5, top / 4, top / 2, top]
            arrays["density_weights"] = [0.01, 0.2, 0.5, 0.2, 0.06, 0.01, 0.01, 0.01]
            for which in ("first", "previous"):
                arrays[f"overlap_{which}_matrix"] = [0.9, 0.1, 0.0, 0.1, 0.8, 0.1, 0.0, 0.1, 0.7]
            notes["spectrum"] = {"size": 100, "certified": [top, top / 2, top / 4], "num_vectors": 1}
            notes["overlap"] = {"lag_first": step, "lag_previous": 50}
    if family == "collapse":
        for j, layer in enumerate(layers):
            end = "" if layer == "last" else f"/{layer}"
            scalars.update({f"nc1{end}": 2.0 / (j + 1) * math.exp(-step / 100), f"cdnv{end}": 0.5 / (j + 1)})
            scalars[f"nc1_floor{end}"] = 100.0
        scalars.update(nc2_equinorm=0.2, nc2_equiangular=0.1, nc3=0.3, nc4=max(0.0, 0.5 - step / 200))
        scalars["accuracy"] = min(1.0, 0.5 + step / 200)
        notes["layers"] = list(layers)
    if family == "displacement":
        scalars = {
            "from_init": math.sqrt(step),
            "relative": math.sqrt(step) / 9,
            "step": 0.1,
            "path_length": 0.1 * step,
        }
        scalars["norm/net_0"] = 3.0
        lags = [float(lag) for lag in range(1, max(2, step))][:40]
        arrays["from_init_lags"], arrays["from_init_squares"] = lags, [lag**1.2 for lag in lags]
        arrays["from_init_steps"] = [0.01 * noise for _ in lags]
        if is_last:
            angles = [0.2 * t for t in range(200)]
            arrays["q_top_1"], arrays["p_top_1"] = [math.cos(t) for t in angles], [math.sin(t) for t in angles]
    if family == "sharpness":
        scalars = {"batch_sharpness": 9 * noise, "stability_threshold": 10.0, "edge_ratio": 0.9 * noise, "ias": 3.0}
        errors = {"batch_sharpness": 0.5, "edge_ratio": 0.05}
    if family == "noise":
        scalars = {"trace": 0.1 * noise, "squared_gradient_norm": 0.01, "signal_to_noise": -0.1 + 0.01 * i}
        errors = {"trace": 0.01}
    if family == "sam":
        scalars = {"sharpness_gap": 0.01, "gradient_cosine": 0.9, "perturbation_norm": 0.05}
    return Record(
        step=step,
        monitor=name,
        scalars={f"{family}/{key}": value for key, value in scalars.items()},
        errors={f"{family}/{key}": value for key, value in errors.items()},
        arrays={f"{family}/{key}": values for key, values in arrays.items()},
        notes=notes,
        global_step=step,
        epoch=step // 50,
        time=1_700_000_000.0 + step,
        seconds=0.01,
        final=is_last,
    )
