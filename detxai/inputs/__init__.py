"""From sources to pictures: paths in, decoded images, letterboxed squares and drawn labels out.

Imports the ground only.
"""
