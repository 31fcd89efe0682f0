"""Short scripts that show LEPTON at work. Run them in the repository's folder: `python -m examples.look_inside`."""
