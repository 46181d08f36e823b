"""Segmentation from attention: by names (:func:`segment`), and its result type."""

from seg4diff.segmentation.result import Segmentation
from seg4diff.segmentation.zero_shot import segment

__all__ = ["Segmentation", "segment"]
