"""raykd distils large language models into smaller ones, on-policy and at scale. Importing it loads nothing heavy."""

__version__ = "0.1.0"
