"""Speed and loss of artifacts.

In: a session and tokens. Out: measured medians, losses, executed experts.
Begin at `evaluate` or `bench`.
"""
