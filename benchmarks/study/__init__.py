"""What each of the choices in Sgfr does to its accuracy, one varied at a time."""
