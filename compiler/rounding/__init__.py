"""Weights and cache in fewer bits, as PyTorch computes with them.

In: a model, a type and token windows. Out: the model with rounded weights; scales of an int8 cache.
Begin at `formats`, which says what is stored how.
"""
