"""What things cost, and what is decided from it: which rows are kept, which rank trains what."""
