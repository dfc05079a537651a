"""Graph, tokenizer and plan -> files, atomically.

In: a specialised graph. Out: out.onnx and its data, or a bundle. Begin at `output`.
"""
