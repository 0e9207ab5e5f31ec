"""What holds an alignment back from forgetting (Lin et al. 2024, section 3): a file each, plugged into stepping.py."""
