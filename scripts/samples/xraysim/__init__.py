"""Synthetic baggage X-rays by physics: thickness maps, two energies, pseudo-colour.

``geometry`` draws shapes as thickness maps, ``physics`` turns thickness into a picture, ``items``
holds the five prohibited classes, ``catalogue`` says which of them a study packs, ``clutter`` and
``electronics`` hold everything innocent, and ``bags`` packs a bag.
"""

VERSION = "1"
"""Version of the pixels: image k of seed s is the same picture as long as this stays the same."""
