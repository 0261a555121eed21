"""The colours of the house style as variables of a style sheet, so that one drawing is read on white and on black."""

from __future__ import annotations

from lightning_dynamics.recording.figures import style

VARIABLES = {
    "#000000": "--ink",
    "#ffffff": "--paper",
    style.BLUE: "--blue",
    style.VERMILION: "--vermilion",
    style.GREEN: "--green",
    style.PURPLE: "--purple",
    style.ORANGE: "--orange",
    style.SKY: "--sky",
    style.GREY: "--grey",
    style.PALE: "--pale",
    "#b0b0b0": "--pale",  # matplotlib's grids
    "#cccccc": "--pale",  # its frames of legends
}
"""Variables by the colour that they have on white paper."""
GRADED = "graded"
"""Class of what has other colours too, those of a scale: the style sheet turns it over on black."""


def css_colour(colour: str) -> str:
    """A colour of the house style as its variable; any other as it is."""
    variable = VARIABLES.get(colour.lower())
    return colour if variable is None else f"var({variable})"
