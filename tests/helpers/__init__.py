"""What the tests share: operators with known spectra, modules, trainers, digests."""
