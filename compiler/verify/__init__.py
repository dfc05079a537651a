"""The artifact, as it runs, against PyTorch's model.

In: an artifact, the model and the plan. Out: a `Verification`, or an error. Begin at `parity`.
"""
