"""What works on frozen arrays and what is refused, found out by trying."""
