"""Say how one decode step is computed, as a short list of fused launches.

In: a graph with RoutedExperts nodes. Out: a step program, as JSON in the metadata.
Begin at `program`; `walk` reads the graph, `fuse` joins operations.
"""
