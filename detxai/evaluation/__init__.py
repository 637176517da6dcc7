"""How faithful and how well placed the maps of methods are, on images of the user's own. Stands on run."""
