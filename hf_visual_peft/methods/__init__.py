"""The methods. Folders follow the taxonomy of the survey (arXiv 2402.02242); one method, one file."""
