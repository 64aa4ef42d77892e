"""Runs as one HTML page, with its charts as PNG and CSV beside it."""
