"""Many plans compared.

In: a model, methods and budgets. Out: `SweepResults`; `report` draws them. Begin at `cells`.
"""
