"""Measure the library against its peers; `python -m benchmarks` runs all."""
