"""Graph, tokenizer and plan -> files, atomically.

In: a specialised graph, or a program of torch. Out: out.onnx and its data, a bundle, or out.pt or
out.pt2. Begin at `output`.
"""
