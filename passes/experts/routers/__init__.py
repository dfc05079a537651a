"""How routers compute their scores, in fewer nodes.

In: a router as exported. Out: the same choice of experts. Begin at `group_limit`.
"""
