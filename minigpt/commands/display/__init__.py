"""What a person sees while a command works: progress, a status line, the start of compiling."""
