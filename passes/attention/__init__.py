"""Attention that appends to its cache in place.

In: the standard operator. Out: GroupQueryAttention, with an int8 cache if asked for, or products
with a cache of latents (`latent`), which CUDA caches expanded (`expand_latents`).
Begin at `group_query`.
"""
