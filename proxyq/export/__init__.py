"""Quantized networks for the runtimes that people have, one file for each."""
