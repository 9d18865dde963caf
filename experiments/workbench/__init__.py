"""What runs, keeps, judges and shows experiments."""
