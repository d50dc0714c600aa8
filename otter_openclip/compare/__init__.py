"""Does it help on these pairs, and by how much? Losses tuned alike, repeated and reported."""
