"""Several runs of one job under different strategies, and the report that compares them."""
