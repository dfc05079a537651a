"""A sweep's results as one page without script or network, and as tables.

In: `SweepResults`. Out: HTML, SVG, CSV, Markdown. Begin at `page`.
"""
