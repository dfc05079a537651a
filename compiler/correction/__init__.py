"""Kept experts changed so that they make up for dropped ones.

In: a model and a plan. Out: a `Correction` per layer. Begin at `fitting`.
"""
