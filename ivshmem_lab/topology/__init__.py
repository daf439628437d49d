"""What a lab is made of, as values, and the formats in which people write it down. Pure."""
