"""Text -> token windows.

In: a checkpoint and a file, a dataset or nothing. Out: a `CalibrationSet`. Begin at `windows`.
"""
