"""Graph rewrites over onnx_ir: a plan becomes code here."""
