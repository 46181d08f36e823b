"""Segmentation measured on data sets under the protocols of the papers, and CLIP score."""

from typing import Literal

ProtocolName = Literal["oracle", "full", "presence", "unsupervised"]
BackgroundBy = Literal["threshold", "prompt"]
