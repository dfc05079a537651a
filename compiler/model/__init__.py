"""A checkpoint on disk, and the model that runs.

In: a folder or a hub id. Out: `Checkpoint` and `MoeModel`, whole or in parts (`replay`).
Begin at `loading`; a family that can't work is a row in `architectures`.
"""
