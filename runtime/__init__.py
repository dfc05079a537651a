"""Runs compiled artifacts: numpy, onnxruntime and tokenizers, never torch."""
