"""The artifact in onnxruntime against PyTorch.

In: an artifact, the model and the plan. Out: a `Verification`, or an error. Begin at `parity`.
"""
