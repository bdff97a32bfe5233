"""Token reduction inside vision towers of open_clip, timm and transformers."""

from tokensieve.pipeline.towers.base import TowerHandle
from tokensieve.pipeline.towers.compress import compress_tower
from tokensieve.pipeline.towers.load import load_tower
from tokensieve.pipeline.towers.macs import tower_macs
from tokensieve.pipeline.towers.trace import TowerTrace

__all__ = ["TowerHandle", "TowerTrace", "compress_tower", "load_tower", "tower_macs"]
