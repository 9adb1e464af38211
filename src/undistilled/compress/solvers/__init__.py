"""Ways to choose a weight's values in a given scheme; none of them chooses the scheme."""
