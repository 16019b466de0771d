"""Reports of finished runs: plots, HTML pages, comparisons, model cards and uploads to the Hub."""
