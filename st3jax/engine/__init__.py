"""What the transforms share: a step, and the two families of states."""
