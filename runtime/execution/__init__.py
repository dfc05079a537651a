"""An artifact in onnxruntime.

In: token ids. Out: logits, and keys and values in a cache. Begin at `session`.
"""
