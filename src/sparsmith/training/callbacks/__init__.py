"""Everything around the loop that is not the loop."""
