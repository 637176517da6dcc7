"""From maps and trials to numbers and a verdict. Imports the ground only, and no torch."""
