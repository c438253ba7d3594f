"""This engine inside other repositories. Each module imports the repository it is for: none is imported from here."""
