"""What is read and drawn from finished runs: plots, pages, comparisons, model card, upload."""
