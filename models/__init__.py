"""LightningModules: image classifiers with any timm backbone, and language models."""

from .language import LanguageModel
from .networks import GPT, LSTM, PRESETS, GPTConfig, LSTMConfig
from .vision import VisionClassifier

__all__ = ["GPT", "LSTM", "PRESETS", "GPTConfig", "LSTMConfig", "LanguageModel", "VisionClassifier"]
