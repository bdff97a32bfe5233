"""Why it works, and where it must fail: reports on what a model attends to."""

from tokensieve.analysis.sink_picture import draw_sinks
from tokensieve.analysis.sinks import (
    SinkReport,
    attention_drop_error,
    attention_sinks,
    column_entropy,
    row_entropy,
    tower_sinks,
)

__all__ = [
    "SinkReport",
    "attention_drop_error",
    "attention_sinks",
    "column_entropy",
    "draw_sinks",
    "row_entropy",
    "tower_sinks",
]
