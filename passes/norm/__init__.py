"""Normalisations, fused with the residual additions before them.

In: Add and RMSNormalization nodes. Out: SkipSimplifiedLayerNormalization. Begin at `skip_norms`.
"""
