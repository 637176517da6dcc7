"""From a user's file to predictions that can be pinned and differentiated. Imports the ground only."""
