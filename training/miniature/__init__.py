"""A drawn world, a text-to-image model of a few million parameters that learns it, and what PSA does to it."""
