"""Sources, decoding, clip sampling and the input pipeline.

Everything here is host-side numpy. Nothing imports jax: grain, PyAV and the
optional packages are imported where they are used.
"""
