"""What the three exercises stand on."""
