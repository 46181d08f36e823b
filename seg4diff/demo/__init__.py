"""A small Stable Diffusion 3 pipeline that grounds words, and the scenes it was trained on.

`seg4diff.load_pipeline("demo")` loads it, made of real diffusers classes, from files that come with the
package; `scene(seed)` draws an image with a caption and a label for every pixel. Nothing is downloaded.
"""

from __future__ import annotations

from pathlib import Path

from .scenes import CLASSES, HELD_OUT, Scene, scene

__all__ = ["CLASSES", "HELD_OUT", "WEIGHTS", "Scene", "scene"]

WEIGHTS = Path(__file__).parent / "weights"
"""Folder of the bundled model, in diffusers' own format."""
