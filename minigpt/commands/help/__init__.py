"""Pages of --help, and the messages of a command: usage errors, failures, ineffective options."""
