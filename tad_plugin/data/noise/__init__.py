"""Label noise as a versioned object, with its text form, its flips and label files."""
