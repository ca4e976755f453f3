"""Preference pairs, users, and their caches: from files to what a training step reads."""
