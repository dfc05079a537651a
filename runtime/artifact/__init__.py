"""What an artifact is on disk, without running it.

In: a path. Out: its files, its plan, its dial. Begin at `plan`, the contract with the compiler.
"""
