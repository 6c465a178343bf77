"""What each generated token attended to: recording it, reading it, and showing it."""
