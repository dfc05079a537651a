"""Model and plan -> a torch program, for those who run artifacts in torch.

In: a checkpoint, a plan and its corrections. Out: a TorchScript or torch.export file, without the
plan. Begin at `build`.
"""
