"""The commands, thin: options to settings, a run to an exit code. Nothing here imports torch before a command runs."""
