"""What a run keeps on disk while it works, and the processes that share it.

In: results as they come. Out: the same after an interruption. Begin at `results`.
"""
