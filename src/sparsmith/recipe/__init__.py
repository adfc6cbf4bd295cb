"""The recipe: typed settings of a run and their loader."""
