"""Results of runs side by side: statistics, the table of a comparison, and a page."""
