"""Folders for ``open_clip.create_model``: exported, converted, or put together from two towers."""
