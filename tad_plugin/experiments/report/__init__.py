"""Tables, pictures and the HTML page of runs and comparisons."""
