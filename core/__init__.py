"""The vocabulary that every room shares: records, configuration, clock and errors. Imports nothing of the project."""
