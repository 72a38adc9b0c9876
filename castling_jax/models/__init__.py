"""Flax NNX modules: attention, backbones and detectors, and their parameter trees."""
