"""The program: runs, comparisons and reports, as the command line and the reproduction scripts use them."""
