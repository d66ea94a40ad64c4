"""What made data/: each module writes one part of it anew."""
