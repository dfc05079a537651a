"""What each operator of a graph is in a step program.

In: nodes. Out: operations, and what is known of values. Begin at `elementwise`.
"""
