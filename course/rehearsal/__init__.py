"""Runs the lessons as on a GPU, without one: true sizes, true formats, memory counted, and no numbers computed."""
