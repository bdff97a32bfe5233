"""Adaptation at test time: a stream of images, a memory of the confident ones, no training."""

from tokensieve.pipeline.adaptation.tca_stream import TCAStream

__all__ = ["TCAStream"]
