"""Texts for many clients at once, over HTTP.

In: a model, requests. Out: answers, piece by piece. Begin at `app`.
"""
