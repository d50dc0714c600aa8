"""What frozen towers give: computed once a sample, kept in a file for each shard, read in training."""
