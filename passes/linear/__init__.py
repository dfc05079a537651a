"""Weights of linear layers and embeddings: fewer bits, fewer products.

In: MatMul and Gather nodes. Out: MatMulNBits and GatherBlockQuantized. Begin at `quantize`.
"""
