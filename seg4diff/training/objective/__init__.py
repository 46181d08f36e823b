"""The losses of MAGNET, the matching of masks with words, and the module that computes them."""
