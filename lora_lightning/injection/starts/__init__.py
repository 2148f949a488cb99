"""Starts that look at the base's weights or at data, one file a method; ``residual`` keeps a base that they changed."""
