"""Settings: their definitions, recipes, the command line and settings files."""
