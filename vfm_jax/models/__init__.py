"""Encoders, predictors and denoisers."""
