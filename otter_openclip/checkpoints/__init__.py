"""Checkpoints in, folders for stock open_clip out."""
