"""Embedding store, probes and reports."""
