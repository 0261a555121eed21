"""Configuration of the documentation; ``sphinx-build -W docs docs/_build``."""

from __future__ import annotations

from docutils import nodes
from docutils.parsers.rst import Directive
from docutils.statemachine import StringList

import lightning_dynamics
from lightning_dynamics.callbacks.collapse_table import collapse_table
from lightning_dynamics.callbacks.displacement_table import displacement_table
from lightning_dynamics.callbacks.hessian_table import hessian_table
from lightning_dynamics.callbacks.ledger import COST
from lightning_dynamics.callbacks.noise_table import noise_table
from lightning_dynamics.callbacks.sam_table import sam_table
from lightning_dynamics.callbacks.sharpness_table import sharpness_table

project = "lightning_dynamics"
author = "The lightning_dynamics developers"
copyright = "2026, " + author
version = release = lightning_dynamics.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = "lightning_dynamics"
html_static_path = ["_static"]
myst_enable_extensions = ["colon_fence", "linkify"]
myst_heading_anchors = 3
autodoc_member_order = "bysource"
autodoc_typehints = "none"
napoleon_custom_sections = ["Logs", "Cost"]
napoleon_use_ivar = True
# the tables of quantities are read from the code

TABLES = {
    "hessian": hessian_table(3, 1),
    "collapse": collapse_table(None, False),
    "displacement": displacement_table(None, True, True, ["top_1"]),
    "sharpness": sharpness_table(),
    "noise": noise_table(1),
    "sam": sam_table(),
    "dynamics": COST,
}


class Quantities(Directive):
    """A table of what a monitor logs, from its declarations."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        table = TABLES[self.arguments[0]]
        whole = {q.key for q in table.quantities if not q.per_layer}
        layered = {q.key for q in table.quantities if q.per_layer}
        rows = [["key", "symbol", "unit", "what it is", "error", "source"]]
        for q in table.quantities:
            if q.per_layer and q.key in whole:
                continue  # the row of the last layer says so by a plus
            layer = "/<layer>" if q.per_layer else ""
            key = f"`{table.family}/{q.key}{layer}`" + ("" if q.on_by_default else " (record)")
            key += " +" if q.key in layered and not q.per_layer else ""
            rows.append([key, q.symbol, q.unit, q.definition, q.error, q.source])
        if {row[2] for row in rows[1:]} == {"1"}:
            rows = [[*row[:2], *row[3:]] for row in rows]
        rows.insert(1, ["---"] * len(rows[0]))
        lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
        holder = nodes.container()
        self.state.nested_parse(StringList(lines), self.content_offset, holder)
        return holder.children


def setup(app):
    app.add_directive("quantities", Quantities)
