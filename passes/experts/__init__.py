"""RoutedExperts -> onnxruntime's MoE operator, specialised to a plan.

In: nodes with all experts' weights. Out: operators that run what the plan keeps.
Begin at `lower`; `policies` has one function a redistribution.
"""
