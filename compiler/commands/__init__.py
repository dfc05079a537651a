"""The commands that need the compiler: options in, exit code out, no logic.

In: a command line. Out: files and a result on stdout. Begin at `alloc_compile`.
"""
