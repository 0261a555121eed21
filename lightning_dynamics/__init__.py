"""See how training moves: monitors for a Lightning Trainer that leave the run as it was, bit for bit."""

__version__ = "0.1.0.dev0"
