"""``lightning-dynamics``: look at runs, and share them."""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Sequence

import lightning_dynamics
from lightning_dynamics.cli import report, tensorboard, wandb

_COMMANDS = (report, tensorboard, wandb)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: Its arguments; those of the process if None.

    Returns:
        The exit status: 0, or 2 for a mistake of the caller's, said in one line.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # names may hold what a terminal's encoding has no letter for
            stream.reconfigure(errors="backslashreplace")
    parser = argparse.ArgumentParser(
        prog="lightning-dynamics", description="Look at runs that lightning_dynamics measured, and share them."
    )
    parser.add_argument("--version", action="version", version=f"lightning_dynamics {lightning_dynamics.__version__}")
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in _COMMANDS:
        command.add_parser(subparsers)
    args = parser.parse_args(argv)
    with warnings.catch_warnings():
        warnings.simplefilter("always", UserWarning)
        warnings.showwarning = _say
        try:
            status: int = args.run(args)
        except BrokenPipeError:  # whoever reads the output has seen enough
            sys.stderr.close()
            return 0
        except (OSError, ValueError, ImportError) as error:
            print(f"lightning-dynamics: {error}", file=sys.stderr)
            return 2
        except KeyboardInterrupt:
            return 130
    return status


def _say(message: Warning | str, *_: object, **__: object) -> None:
    print(f"lightning-dynamics: {message}", file=sys.stderr)
