"""What callers see of a graph: names, dimensions, logits, metadata.

In: the exporter's names. Out: those that ONNX text-generation runtimes expect.
Begin at `rename_cache`.
"""
