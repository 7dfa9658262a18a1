"""Label noise: the spec, its text form, the random flips, class maps, and label files."""
