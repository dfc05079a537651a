"""Many plans compared.

In: a model, methods and budgets, ways and targets of bytes. Out: `SweepResults`; `report` draws
them. Begin at `cells`.
"""
