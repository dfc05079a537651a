"""Plans for what shall come out: bytes that a token reads, or the loss that may be added.

In: a model, its profile and a `Goal`. Out: `Planned`, as for a budget. Begin at `search`.
"""
