"""An artifact in onnxruntime, in kernels of our own (`step_programs`) or torch (`torch_programs`).

In: token ids. Out: logits, and a cache of keys and values, latents or states. Begin at `session`.
"""
