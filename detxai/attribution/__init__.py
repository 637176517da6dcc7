"""From a path and pinned targets to signed maps: coroutines that ask for points, and one engine that packs them.

Knows torch and the ground only."""
