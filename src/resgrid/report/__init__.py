"""What a person reads in the end: tables of the cells, side by side."""
