"""What one GPU does with this project's programs, measured in pieces of a few minutes each."""
