"""Reconstruction: the hidden patches of an image, as a masked autoencoder predicts them."""
