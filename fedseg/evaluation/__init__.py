"""Masks of images, metrics in mm, intervals over patients."""
