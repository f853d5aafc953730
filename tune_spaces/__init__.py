"""The spaces that `raybert tune` searches: one module a method, and one for chains."""
