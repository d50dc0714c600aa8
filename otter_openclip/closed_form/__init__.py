"""The best start on two frozen towers: heads in closed form, and which of the pairs look wrong."""
