"""Models under a plan on tasks of lm-evaluation-harness.

In: an artifact, or a model and a plan. Out: what the harness asks of a model. Begin at `harness`.
"""
