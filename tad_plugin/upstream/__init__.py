"""The public codebases: patches for their checkouts, and running their scripts on a current stack."""
