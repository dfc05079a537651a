"""Programs that are timed in turns, each a process of its own: what they share, and each of them.

`protocol` says what they answer; `artifact`, `llama` and `pytorch` are what answers; `turns` starts
and asks them, `report` says what they took. ``contender.py``, above, is the script of a process.
"""
