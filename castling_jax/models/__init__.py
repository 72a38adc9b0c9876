"""Flax NNX modules of the attention and the backbones, and their parameter trees."""
