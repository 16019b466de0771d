"""Settings: the options of train.py and evaluate.py, recipes, and the command line."""
