"""LightningDataModules for images and text, each with a default that needs no network."""

from lightning_optim.data.cache import DataError
from lightning_optim.data.text import TextData
from lightning_optim.data.vision import VisionData

__all__ = ["DataError", "TextData", "VisionData"]
