"""What must hold before a checkpoint's model is built, and after its weights were read.

In: a folder's configuration and headers, or what the reader gives. Out: nothing, notes or an error.
Begin at `settings`.
"""
