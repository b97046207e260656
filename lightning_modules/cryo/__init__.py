"""Cryo-EM density maps: Fourier shells, measurements, priors and what is restored with them."""
