"""The morning after: reads output trees, says which boxes to look at, how classes behave, and what changed."""
