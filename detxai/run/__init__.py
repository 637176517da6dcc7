"""Where the stages meet: what is explained, in which order, and what becomes of it.

Stands on all but evaluation and cli.
"""
