"""What a user trains: Hydra recipes and the demo (not part of the wheel)."""
