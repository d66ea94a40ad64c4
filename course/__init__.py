"""What instructors, maintainers and CI run: `python -m course`."""
