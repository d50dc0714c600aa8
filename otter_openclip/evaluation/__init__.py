"""F@K and mean average precision for any number of classes: in clip_benchmark, in training, alone."""
