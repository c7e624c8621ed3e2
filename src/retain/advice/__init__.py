"""What to do about forgetting, found by trying it on the model itself."""
