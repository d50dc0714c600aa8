"""A run's checkpoints: the ``.pt`` files in its folder."""
