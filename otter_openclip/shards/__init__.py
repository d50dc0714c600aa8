"""Webdataset shards: how samples are read and written. The ground floor: no torch."""
