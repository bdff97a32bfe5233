"""Measuring answers: scores, their spread, and the run that makes them."""
