"""Small runs for TensorBoard: records and event files, without training."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lightning.pytorch.loggers import TensorBoardLogger

from lightning_dynamics.recording.figures.density import DensityView
from lightning_dynamics.recording.quantity import Quantity, QuantityTable
from lightning_dynamics.recording.record import Record, RecordFile
from lightning_dynamics.recording.writer import Display, LoggerWriter

STEPS = (0, 10, 20, 30, 40)


def _quantity(key: str, panel: str, on_by_default: bool = True, form: str = "scalar") -> Quantity:
    return Quantity(key, "", "1", "One.", "own", "none", panel, on_by_default, form=form)


TABLE = QuantityTable(
    "hessian",
    "Hessian",
    (
        _quantity("edge_ratio", "Edge ratio"),
        _quantity("top_1", "Sharpness and threshold"),
        _quantity("stability_threshold", "Sharpness and threshold"),
        _quantity("top_10", "Tail"),
        _quantity("swing", "Swing", on_by_default=False),
        _quantity("never", "Never"),
        _quantity("density", "Density", form="density"),
    ),
    headline=("edge_ratio", "top_1", "swing", "never", "density"),
)


def write_run(
    root: Path,
    name: str,
    level: float = 1.0,
    tables: Sequence[QuantityTable] = (TABLE,),
    figures: bool = False,
) -> Path:
    """A run with five points of each of these quantities but ``never``, and a bulk from which an outlier moves away."""
    logger = TensorBoardLogger(root, name="", version=name)
    writer = LoggerWriter([logger], display=Display(figures=figures))
    writer.begin([table.only(q.name for q in table.quantities if q.on_by_default) for table in tables], "# About\n")
    file = RecordFile(root / name)
    quantities = {key: said for table in tables for key, said in table.describe().items()}
    header = {"families": {t.family: t.title for t in tables}, "quantities": quantities, "time": 1.0}
    file.begin(f"run {name}", f"segment {name}", None, header)
    for step in STEPS:
        values = {
            f"{table.family}/{q.key}": level * (place + step)
            for table in tables
            for place, q in enumerate(table.quantities)
            if q.form == "scalar" and q.key != "never"
        }
        file.append(Record(step, "Monitor", values))
        top = 4 + step / 5
        nodes, weights = [*(i / 10 for i in range(11)), top], [0.09] * 11 + [0.01]
        view = DensityView("hessian/density", nodes, weights, 100, [top], 2, 20.0, "Hessian", "loss/θ²")
        writer.write({k: v for k, v in values.items() if not k.endswith("swing")}, step, [view], step == STEPS[-1])
    logger.save()
    logger.finalize("success")
    return root / name
