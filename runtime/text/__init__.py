"""Text in, text out.

In: prompts. Out: completions, token by token. Begin at `model`.
"""
