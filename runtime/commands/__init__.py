"""The commands that need the base install only: options in, exit code out.

In: a command line. Out: a result on stdout, all else on stderr. Begin at `alloc_run`.
"""
