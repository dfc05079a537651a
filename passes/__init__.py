"""Graph rewrites over onnx_ir: a plan becomes code here.

In: a graph with RoutedExperts nodes. Out: one that stock onnxruntime runs.
Begin at `default`, the ordered list; one file is one pass.
"""
