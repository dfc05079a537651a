"""Model -> graph.

In: a checkpoint. Out: an onnx_ir graph with lazy weights, then a copy with a plan compiled in.
Begin at `normalize`; `graph` alone touches transformers' exporter.
"""
