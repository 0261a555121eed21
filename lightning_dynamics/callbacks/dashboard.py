"""What the loggers show of all monitors together, said in one place."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback

from lightning_dynamics.recording.charts import check_layout
from lightning_dynamics.recording.writer import Display


class Dashboard(Callback):
    """What loggers show of all monitors of a Trainer besides curves. Measures nothing; without it, the defaults hold.

    TensorBoard's *Custom Scalars* has one layout per run, the one that is written last. The monitors therefore write
    one for all of them, with the first point; a layout that they find in the run is taken over into it. Charts that
    should stand beside theirs from the start are given here.

    Args:
        extra_layout: Charts of your own, as ``SummaryWriter.add_custom_scalars`` takes them:
            ``{category: {chart: ["Multiline", [pattern, ...]]}}`` or ``["Margin", [value, lower, upper]]``. They stand
            first; a category that a monitor has as well gets the charts of both. TensorBoard matches patterns at the
            beginning of tags: ``"^train/loss$"`` is one curve, ``"train/loss"`` also ``train/loss_of_the_teacher``.
        layout: Whether charts are laid out at all.
        figures: Whether figures are drawn for TensorBoard and W&B: at most ten of a kind. Reports draw them from the
            records anyway.

    Example:
        >>> from lightning_dynamics import Dashboard
        >>> dashboard = Dashboard(extra_layout={"Training": {"Loss": ["Multiline", ["^train/loss$", "^val/loss$"]]}})
    """

    def __init__(
        self,
        *,
        extra_layout: Mapping[str, Mapping[str, Sequence[Any]]] | None = None,
        layout: bool = True,
        figures: bool = True,
    ) -> None:
        try:
            check_layout({} if extra_layout is None else extra_layout, "extra_layout")
        except ValueError as error:
            raise MisconfigurationException(str(error)) from None
        if extra_layout and not layout:
            raise MisconfigurationException("`layout=False` lays out no charts: `extra_layout` would not be seen.")
        self.display = Display(layout, extra_layout or {}, figures)


def display_of(callbacks: Iterable[Callback]) -> Display:
    """What the Dashboard among these callbacks asks for.

    Raises:
        MisconfigurationException: If there are several.
    """
    dashboards = [callback for callback in callbacks if isinstance(callback, Dashboard)]
    if len(dashboards) > 1:
        raise MisconfigurationException(
            f"A Trainer has one Dashboard, which speaks for all monitors; there are {len(dashboards)}. Join them."
        )
    return getattr(dashboards[0], "display", Display()) if dashboards else Display()
