"""Model and plan -> a checkpoint under a plan, for those who run models in transformers.

In: a checkpoint, a plan and its corrections. Out: a folder in the Hugging Face layout with the plan
beside the weights. Begin at `build`.
"""
