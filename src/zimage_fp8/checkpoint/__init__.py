"""Checkpoints on disk: strict reading, streaming deterministic writing, formats, verification."""
