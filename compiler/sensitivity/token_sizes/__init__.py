"""How large what experts add is for one token, predicted from what enters them.

In: a model, token windows and the sizes of its experts. Out: `TokenSizes` of each layer.
Begin at `fitting`; `wanted` says whether a compile has them, `regression` is the fit.
"""
