"""Steps by kernels of our own: an artifact's program is checked, and what can run it is opened.

In: a program, weights, the graph's cache. Out: logits. Begin at `kernels`.
"""
