"""Other ways to make a vision transformer cheaper, under the same interface, to compare with."""
