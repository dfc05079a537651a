"""What a plan means, in PyTorch: the experts it runs, and what that does to the loss.

In: a model and a plan. Out: logits, losses, counts of executed experts.
Begin at `policies`: one function a redistribution.
"""
