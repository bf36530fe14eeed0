"""Linen building blocks."""
