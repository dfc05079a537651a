"""What fewer experts cost each layer.

In: a model and token windows. Out: a `SensitivityProfile`.
Begin at `measuring`; each metric has a file: `fisher`, `output`, `replayed` (kl, ppl-suffix).
"""
