"""Simulations that show what the theorems say, on problems small enough to be exact."""
