"""How a budget is spent.

In: a model, its profile, and a budget or a goal. Out: `Planned`, the plan and its corrections.
Begin at `plan`; the exact solver is `knapsack`, goals are met in `targets`.
"""
