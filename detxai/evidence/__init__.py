"""What a map says beyond the score: measures, typicality, and a verdict with its reasons."""
