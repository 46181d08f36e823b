"""Segmentation from attention: by names, and into regions without names.

Nothing is imported here, so that `seg4diff.segmentation.presets` loads without torch.
"""
