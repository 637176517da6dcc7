"""Settings: YAML, environment and options in, one checked `RunConfig` and its fingerprint out.

Imports the ground only.
"""
