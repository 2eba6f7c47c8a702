"""What the bytes mean: the IR and the bit layouts."""
