"""Facts, the decode plan, measurements and their provenance. Knows no price."""
