"""Artifacts of TorchScript and torch.export in torch: the only room of the runtime that knows it.

In: token ids. Out: logits, and keys and values in a cache. Begin at `session`.
"""
