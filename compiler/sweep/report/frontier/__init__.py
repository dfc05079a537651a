"""Loss against the bytes that a token reads: which ways to spend them no other beats.

In: `SweepResults` with cells of targets. Out: a section, tables, a picture. Begin at `points`.
"""
