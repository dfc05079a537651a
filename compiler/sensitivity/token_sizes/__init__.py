"""How large what each expert adds is for one token: whether that is fitted, the fit, what is kept.

In: a model, its calibration text and a profile's sizes. Out: `TokenSizes` of each layer.
Begin at `fitting`.
"""
