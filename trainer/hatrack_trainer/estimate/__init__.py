"""What a run will take, told before its base is loaded."""
