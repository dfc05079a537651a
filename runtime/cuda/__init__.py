"""Decode steps by kernels of our own, captured in one CUDA graph, and prompts.

In: the step program of an artifact and its weights on the device. Out: logits. Begin at `stepper`.
"""
