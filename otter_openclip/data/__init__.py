"""Data sets as downloaded, turned into webdataset shards for evaluation and for training."""
