"""What a compact file is made of: a header, and a block for each leaf."""
