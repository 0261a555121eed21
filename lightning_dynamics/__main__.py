"""``python -m lightning_dynamics``."""

from lightning_dynamics.cli import main

raise SystemExit(main())
